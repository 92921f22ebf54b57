"""The operators of torch that a call runs: which are not deterministic on CUDA, and how many launch a kernel."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastloss._ops import autograd

# Operators of which `torch.use_deterministic_algorithms` says that they are not deterministic on CUDA, by their names
# in ATen, and others that run the same kernels. It takes the rest for deterministic.
ADD = ("index_add", "scatter_add")
"""Additions along a dimension to the places of an index: atomic ones."""
REDUCE = ("scatter_reduce", "index_reduce")
"""The same with a kind of reduction. Minimum and maximum do not depend on an order."""
COPY = ("index_copy", "scatter")
"""Writes along a dimension, of which the last wins."""
PUT = ("index_put", "_index_put_impl", "_unsafe_index_put")
"""Writes or additions to the places of several indices. Additions are sorted by place on CUDA, atomic on the CPU."""
SCANS = ("cumsum", "cumprod", "logcumsumexp")
"""Of floating-point numbers, on CUDA: blocks add up what others have finished by then."""
ALWAYS = (
    "put", "histc", "kthvalue", "median.dim", "nanmedian.dim",
    "nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "_cudnn_ctc_loss",
    "_embedding_bag_backward", "_embedding_bag_dense_backward", "convolution_backward",
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward", "max_pool3d_with_indices_backward", "max_unpool2d", "max_unpool3d",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward",
)  # fmt: skip
"""On CUDA."""


def _distinct(index: Tensor, dim: int) -> bool:
    """Whether no place occurs twice along the dimension."""
    if index.numel() == 0 or index.dim() == 0:
        return True
    ordered = index.sort(dim).values
    return not bool((ordered.diff(dim=dim) == 0).any())


def _distinct_places(into: Tensor, indices: list[Tensor | None]) -> bool:
    """Whether the places to which `index_put` writes are all different."""
    some = [i for i in indices if i is not None]
    if any(i.dtype in (torch.bool, torch.uint8) for i in some):
        return True  # a mask names a place once
    sizes = [n for n, i in zip(into.shape, indices, strict=False) if i is not None]
    place: Any = 0
    for size, index in zip(sizes, torch.broadcast_tensors(*some), strict=True):
        place = place * size + index % size
    return _distinct(place.flatten(), 0)


def is_deterministic(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cuda: bool = True) -> bool:
    """Return whether the operator gives the same bits for these arguments at any time, on CUDA or on the CPU.

    Where the places of an index are all different there is nothing to add up, and no order.
    """
    packet, _, overload = operator.name().removeprefix("aten::").partition(".")
    name = packet.removesuffix("_")
    given = {a.name: v for a, v in zip(operator._schema.arguments, args, strict=False)} | kwargs
    into = given.get("self")
    floating = isinstance(into, Tensor) and (into.is_floating_point() or into.is_complex())
    if name in PUT:
        if given.get("accumulate") and (cuda or not floating):
            return True
        return _distinct_places(into, given["indices"])
    if name not in COPY and not cuda:
        return True
    if name in ALWAYS or f"{name}.{overload.removesuffix('_values')}" in ALWAYS:
        return False
    if name in SCANS:
        dtype = given.get("dtype") or (torch.float32 if floating else torch.int64)
        return not dtype.is_floating_point
    if name == "bincount":
        return given.get("weights") is None
    if (name in ADD and not floating) or (name in REDUCE and given["reduce"] in ("amax", "amin")):
        return True
    if (
        name in ADD + REDUCE + COPY and "value" not in given
    ):  # one value, wherever it goes, leaves no question
        return _distinct(given["index"], given["dim"] if given["index"].dim() > 1 else 0)
    return True


class Operators(TorchDispatchMode):
    """Records the operators of torch that run: `found` are not deterministic, `launches` run a kernel.

    The dispatcher shows it what runs on the CPU; with `cuda` the question is what the same operators do there.
    """

    def __init__(self, cuda: bool = True) -> None:
        super().__init__()
        self.cuda = cuda
        self.found: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if func.namespace == "aten" and not is_deterministic(func, args, kwargs, self.cuda):
            self.found[name] += 1
        if launches(func, args):
            self.launches[name] += 1
        return func(*args, **kwargs)


SILENT = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "set_",
    "is_same_size", "record_stream",
)  # fmt: skip
"""They make no numbers, and have no alias in their schema that says so."""


def launches(operator: Any, args: tuple[Any, ...]) -> bool:
    """Return whether the operator runs a kernel, or a copy between devices, if it is no operator of our own."""
    packet = operator.name().partition("::")[2].partition(".")[0]
    return not operator.is_view and packet not in SILENT


@contextlib.contextmanager
def past_the_dispatcher() -> Iterator[None]:
    """Let calls take the road that they take without a mode, in spite of the one that watches them."""
    with mock.patch.object(autograd, "_dispatch_modes", lambda: 0):
        yield
