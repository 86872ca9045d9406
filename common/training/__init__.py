"""Training that several papers share: one supervised loop, its learning-rate schedule, and evaluation."""

from common.training.supervised import NonFiniteError, Schedule, accuracy, fit

__all__ = ["NonFiniteError", "Schedule", "accuracy", "fit"]
