"""The losses as functions, under the names that the field knows them by."""

from fastloss.token import cross_entropy

__all__ = ["cross_entropy"]
