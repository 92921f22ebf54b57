"""Fused loss functions for PyTorch: drop-in, accurate, deterministic, one read of the input."""

from fastloss import functional, memory, nn, reference
from fastloss._ops import autograd, derivatives
from fastloss.profiler import profile

__all__ = ["functional", "memory", "nn", "profile", "reference"]
__version__ = "0.1.0"

derivatives.refuse_others(autograd.LIBRARY)
