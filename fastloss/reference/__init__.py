"""Every loss in plain PyTorch, written from its formula: slow, readable, differentiable any number of times."""

from fastloss.reference import sequence, token
from fastloss.reference.sequence import *  # noqa: F403
from fastloss.reference.token import *  # noqa: F403

__all__ = [name for family in (token, sequence) for name in family.__all__]
