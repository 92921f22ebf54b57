"""Fused loss functions for PyTorch: drop-in, exact, at the limit of the memory."""

from fastloss import functional, memory, nn, reference
from fastloss.profiler import profile

__all__ = ["functional", "memory", "nn", "profile", "reference"]
__version__ = "0.1.0"
