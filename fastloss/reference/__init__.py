"""Every loss in plain PyTorch, written from its formula: slow, readable, differentiable any number of times."""

from fastloss.reference.token import cross_entropy

__all__ = ["cross_entropy"]
