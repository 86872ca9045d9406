"""What of a model is trained, in peft's manner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["SaraConfig", "Select"]

Select = Literal["smallest", "largest", "random"]
Matrices = Literal["one", "all"]


@dataclass(frozen=True)
class SaraConfig:
    """Which entries of a model's weights are trained, and how the paper's two extras act (SaRA, arXiv 2409.06633).

    threshold       theta: entries with |p| < theta (smallest) or |p| > theta (largest), over all chosen tensors alike
    fraction        or: so large a share 0..1 of all their entries, exactly; ties go to the first
    select          by magnitude, or at random (needs fraction)
    seed            of what is drawn: random entries, the matrix of the low-rank term
    target_modules  list: names of modules or their endings, such as "to_q"; str: a regular expression of the whole
                    name. None: every module
    vectors         take biases and the weights of norms, too, as the paper ("all parameters") and its code do. Matrices
                    are the weights of Linear, Conv2d and transformers' Conv1D; embeddings stay frozen
    lambda_rank     factor of the nuclear norm of the chosen entries; 0: none. Paper: 5e-3, its published command: 5e-4
    rank_matrices   the matrices of which it is taken each step: "one" drawn at random, as the published code does it
                    (the paper does not say), or "all"
    progressive_at  share of the training after which only those of the chosen entries are trained on that are still
                    below theta; None: all to the end. It acts where the optimizer is told `total_steps`

    Raises ValueError for what does not go together.
    """

    threshold: float | None = None
    fraction: float | None = None
    select: Select = "smallest"
    seed: int = 0
    target_modules: Sequence[str] | str | None = None
    vectors: bool = True
    lambda_rank: float = 0.0
    rank_matrices: Matrices = "one"
    progressive_at: float | None = None

    def __post_init__(self) -> None:
        def refuse(got: str, expected: str) -> None:
            raise ValueError(f"SaraConfig: got {got}; expected {expected}")

        if (self.threshold is None) == (self.fraction is None):
            refuse(f"threshold={self.threshold} and fraction={self.fraction}", "one of the two, e.g. fraction=0.02")
        if self.threshold is not None and not self.threshold > 0:
            refuse(f"threshold={self.threshold}", "more than 0, e.g. 8e-4")
        if self.fraction is not None and not 0 < self.fraction < 1:
            refuse(
                f"fraction={self.fraction}", "a number between 0 and 1, both excluded: it would select nothing or all"
            )
        for name, kinds in (("select", Select), ("rank_matrices", Matrices)):
            if getattr(self, name) not in get_args(kinds):
                refuse(f"{name}={getattr(self, name)!r}", f"one of {get_args(kinds)}")
        if self.select == "random" and self.fraction is None:
            refuse("select='random' with a threshold", "a fraction: nothing random lies below a threshold")
        if not self.lambda_rank >= 0:
            refuse(f"lambda_rank={self.lambda_rank}", "0 or more")
        if self.progressive_at is not None and not 0 < self.progressive_at < 1:
            refuse(f"progressive_at={self.progressive_at}", "a share between 0 and 1, e.g. 0.5, or None")
        if self.progressive_at is not None and self.select != "smallest":
            refuse(f"progressive_at with select={self.select!r}", "select='smallest': it goes by what is still small")
        modules = self.target_modules
        if modules is not None and (not isinstance(modules, Sequence) or not modules):
            refuse(
                f"target_modules={modules!r}", "a list of at least one name, an expression, or None for every module"
            )
