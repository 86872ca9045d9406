"""N:M sparsity: which weights are kept, a packed format, and a linear layer that runs on it.

from kernels import nm
kept = nm.mask(weight, 2, 4)
"""

from __future__ import annotations

from kernels.nm.masks import mask

__all__ = ["mask"]
