"""The pool of warm buffers behind large CPU outputs.

A page fault costs more than the arithmetic that fills the page. Gradients of a megabyte and more on the CPU therefore
come from buffers that keep their pages when the tensor dies, like torch's caching allocator on CUDA. The cache is
limited, by default to a quarter of the machine's memory.

The storage of such a gradient cannot be resized, like that of a tensor from numpy. Code that resizes storages, to shard
or offload gradients, switches the pool off by `set_limit(0)`: gradients are then torch's own allocations.
"""

from __future__ import annotations

from types import ModuleType

try:
    from fastloss import _C  # type: ignore[attr-defined, unused-ignore]  # compiled
except ImportError:  # built for another Python: the losses work, the statistics do not
    _C = None


def _pool() -> ModuleType:
    if _C is None:
        raise RuntimeError(
            "fastloss._C was built for another Python: reinstall fastloss to see its memory pool"
        )
    return _C


def stats() -> dict[str, int]:
    """Return the pool's statistics: bytes in use, cached, at the peak, and the limit; cache hits and misses.

    Returns:
        `in_use_bytes`, `cached_bytes`, `peak_in_use_bytes`, `limit_bytes`, `hits`, `misses`.
    """
    return dict(_pool().pool_statistics())


def empty_cache() -> None:
    """Return every cached buffer to the system. Live tensors keep theirs."""
    _pool().pool_empty()


def set_limit(bytes: int) -> None:
    """Cache at most `bytes` bytes; with 0 there is no pool, and gradients come from torch's allocator.

    Raises:
        ValueError: if `bytes` is negative.
    """
    if bytes < 0:
        raise ValueError(f"bytes: expected a number >= 0, got {bytes}")
    _pool().pool_set_limit(bytes)
