"""The paper's own idea and nothing else: no files, no network, no flags for other papers.

A placeholder until the paper's method is here: soft thresholding of a sparse signal under white noise.

symbol   name here    shape    meaning
x        signal       [n]      what is looked for; few entries differ from zero
y        measured     [n]      x + noise
t        threshold    scalar   entries of y smaller than t are taken for noise
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def soft_threshold(measured: Tensor, threshold: float) -> Tensor:
    """Move every entry towards zero by `threshold`: the minimiser of ½ (x - y)² + t |x|."""
    return measured.sign() * (measured.abs() - threshold).clamp_min(0)


def sparse_signal(length: int, nonzeros: int, generator: Generator) -> Tensor:
    """`nonzeros` ones at random places among `length` zeros."""
    signal = torch.zeros(length)
    signal[torch.randperm(length, generator=generator)[:nonzeros]] = 1.0
    return signal


def disturb(signal: Tensor, noise: float, generator: Generator) -> Tensor:
    """The signal with white noise of standard deviation `noise`."""
    return signal + noise * torch.randn(signal.shape, generator=generator)
