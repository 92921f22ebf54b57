"""Every way in which a tensor with the same numbers can lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def unaligned(x: Tensor) -> Tensor:
    """One element past the start of its storage, so that no 16-byte access is aligned."""
    storage = x.new_empty(x.numel() + 1)
    return storage[1:].view(x.shape).copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else strided(x)


def strided(x: Tensor) -> Tensor:
    """Every second element of a larger tensor along the last dimension."""
    storage = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    return storage[..., ::2].copy_(x)


def padded_rows(x: Tensor) -> Tensor:
    """Rows that are contiguous inside and further apart than they are long."""
    storage = x.new_empty(*x.shape[:-1], x.shape[-1] + 3)
    return storage[..., :-3].copy_(x)


def channels_last(x: Tensor) -> Tensor:
    """The class dimension innermost in memory, whatever the rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 1 else x


def expanded(x: Tensor) -> Tensor:
    """All rows share one row's memory; the only layout that changes the numbers."""
    return x[:1].expand_as(x)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    contiguous,
    unaligned,
    transposed,
    strided,
    padded_rows,
    channels_last,
    expanded,
)


def lay(x: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
    """`x` in that layout; tensors without elements or dimensions have only one."""
    with torch.no_grad():
        return layout(x.detach()) if x.ndim and x.numel() else x.detach()


EACH_ONCE = ("token_ids",)
"""Arguments whose elements must differ, so that they cannot be expanded."""


def lay_each(given: Mapping[str, Tensor], layouts: Iterable[Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    """Each of these arguments in the layout in its place."""
    return {
        name: x if layout is expanded and name in EACH_ONCE else lay(x, layout)
        for (name, x), layout in zip(given.items(), layouts, strict=False)
    }
