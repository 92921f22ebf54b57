"""The pool of warm buffers behind large CPU outputs.

A fresh page of memory costs more than computing what fills it. Gradients of a megabyte and more on the CPU
therefore come from buffers that keep their pages when the tensor dies, like the caching allocator that torch has
on CUDA. What is cached stays within a limit, a quarter of the machine's memory unless set.
"""

from __future__ import annotations

from types import ModuleType

try:
    from fastloss import _C  # type: ignore[attr-defined]  # compiled
except ImportError:  # built for another Python: the losses work, the statistics do not
    _C = None


def _pool() -> ModuleType:
    if _C is None:
        raise RuntimeError(
            "fastloss._C was built for another Python: reinstall fastloss to see its memory pool"
        )
    return _C


def stats() -> dict[str, int]:
    """Bytes in use, cached, at the peak of use, and the limit of the cache; requests served warm and cold.

    Returns:
        `in_use_bytes`, `cached_bytes`, `peak_in_use_bytes`, `limit_bytes`, `hits`, `misses`.
    """
    return dict(_pool().pool_statistics())


def empty_cache() -> None:
    """Give every cached buffer back to the system. Tensors that are alive keep theirs."""
    _pool().pool_empty()


def set_limit(bytes: int) -> None:
    """Cache at most so many bytes; 0 turns the pool into plain allocation.

    Raises:
        ValueError: if `bytes` is negative.
    """
    if bytes < 0:
        raise ValueError(f"bytes: expected a number >= 0, got {bytes}")
    _pool().pool_set_limit(bytes)
