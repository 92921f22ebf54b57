"""Vocabulary-parallel losses: each rank holds a slice of the classes.

Ranks exchange a few numbers per row, never logits. Every rank gets the same loss, and the gradients of its own logits
or slice of the weight; the gradient of hidden states, which are replicated, is all-reduced.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss._ops.autograd import REDUCTIONS, Differentiable, Op
from fastloss._ops.checks import (
    check_floating,
    check_integer,
    check_number,
    check_reduction,
    check_tensors,
)
from fastloss.distributed.collectives import Ranks, check_group, check_once, sum_of_gradients
from fastloss.losses.token_statistics import (
    LSE,
    linear_token_stats_by,
    stats_of_linear,
    stats_of_logits,
    token_stats_by,
)

__all__ = ["cross_entropy", "linear_cross_entropy"]


class _OfSlice(Differentiable):
    """An operator of `token_stats`, in whose backward a row without mass, all of whose logits are -inf, has no part.

    Of one process such a row has NaN gradients; here the other ranks have its mass.
    """

    def __init__(self, op: Op):
        super().__init__(op.name, tensors=op.tensors, wrt=op.wrt)
        self.op = op

    def __call__(self, tensors, options, *how):
        if self.op.masked:
            options = (*options, self._needed(tensors) & self._bits)
        return super().__call__(tensors, options, *how)

    def run_forward(self, plan, tensors, options):
        outputs, state = self.op.operators().fwd(*tensors, *options)
        state.masked_fill_((outputs[LSE] == -torch.inf).unsqueeze(1), 0)  # as rows have that are masked
        return outputs, state

    def run_backward(self, plan, grads, tensors, saved, options):
        found = self.op.operators().bwd(*grads, *tensors, *saved, *options[self.op.backward_options])
        return [found] if isinstance(found, Tensor) else found

    def differentiable_again(self, plan):
        check_once()

    def flops(self, shapes, needed):
        return self.op.flops(shapes, needed)


_of_logits = _OfSlice(stats_of_logits)
_of_linear = _OfSlice(stats_of_linear)


class _NegativeLogProbability(Differentiable):
    """-log p of the target from what each rank knows of its slice: `lse`, and `logp` of a target that is `local`.

    Tensors `(lse, logp, local)`, the option is the group; returns the loss, and how many ranks hold the target.

    Everything is relative to the largest lse M. With the mass s = exp(lse - M) of a slice, and `others` all of it
    but the target's exp(z), the loss is log(1 + others / exp(z)): exact however far the target wins.
    """

    def __init__(self):
        super().__init__("vocabulary_parallel_nll", tensors=3, wrt=(0, 1), outputs=2)

    def run_forward(self, plan, tensors, options):
        (lse, logp, local), (group,) = tensors, options
        top = lse.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        top = torch.where(top.isfinite(), top, 0.0)
        mass = (lse - top).exp()
        apart = torch.where(local, mass * -torch.expm1(logp), mass)
        z = torch.where(local, (lse - top) + logp, 0.0)
        sums = torch.stack([apart, z, local.to(lse.dtype)])
        dist.all_reduce(sums, group=group)
        others, z, owners = sums.unbind(0)
        total = others + z.exp()
        grad_lse = torch.where(local, apart - others, mass) / total
        return torch.logaddexp(others.log() - z, torch.zeros_like(z)), owners, grad_lse

    def run_backward(self, plan, grads, tensors, saved, options):
        grad, local, (grad_lse,) = grads[0], tensors[2], saved
        return [grad * grad_lse, torch.where(local, -grad, 0.0)]

    def differentiable_again(self, plan):
        check_once()  # the saved tensors depend on every rank's logits


_negative_log_probability = _NegativeLogProbability()


def _first_class(like: Tensor, classes: int, group: Any) -> Tensor:
    """Return how many classes the ranks before this one have: on the device, where the host need not wait for it."""
    ranks = Ranks(group, [1] * dist.get_world_size(group))
    sizes = ranks.gathered(torch.full((1,), classes, dtype=torch.int64, device=like.device))
    return sizes[: ranks.rank].sum()


def _targets(
    target: Tensor, rows: int, classes: int, ignore_index: int, first_class: int | None, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rows count, which of them have their class on this rank, and its local index (0 elsewhere)."""
    if target.dtype != torch.int64:
        raise RuntimeError(f"target: expected classes of type int64, got {target.dtype}")
    if target.shape != (rows,):
        raise ValueError(f"target: expected shape {(rows,)}, got {tuple(target.shape)}")
    first: Tensor | int
    if first_class is None:
        first = _first_class(target, classes, group)
    else:
        first = check_integer("first_class", first_class)
    valid = target != ignore_index
    local = valid & (target >= first) & (target < first + classes)
    return valid, local, torch.where(local, target - first, 0)


def _loss(
    stats, valid: Tensor, local: Tensor, target: Tensor, mode: int, dtype: torch.dtype, group
) -> Tensor:
    nll, owners = _negative_log_probability((stats.lse, stats.logp, local), (group,))
    if target.is_cpu:
        wrong = valid & (owners != 1)
        if wrong.any():
            raise IndexError(
                f"Target {target[wrong][0].item()} is out of bounds: expected a class of exactly one rank"
            )
    else:
        nll = torch.where(owners == 1, nll, torch.nan)
    nll = torch.where(valid, nll, 0.0)
    if mode == REDUCTIONS["none"]:
        return nll.to(dtype)
    total = nll.sum()
    return (total / valid.sum() if mode == REDUCTIONS["mean"] else total).to(dtype)


def _scales(logit_scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Return temperature and softcap of `token_stats`, which caps first: s x = (x / T) with a cap of c T."""
    scale = check_number("logit_scale", logit_scale, low=math.ulp(0.0))
    cap = None if softcap is None else check_number("softcap", softcap, low=math.ulp(0.0)) / scale
    return 1 / scale, cap


def cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    first_class: int | None = None,
    group: Any = None,
) -> Tensor:
    r"""Compute vocabulary-parallel cross-entropy: each rank holds the logits of a slice of the classes.

    Equal to `fastloss.functional.cross_entropy` of the concatenated slices. The ranks exchange four numbers per row:
    one all-reduce of the largest log-sum-exp, one of the probability mass, the target's logit and the rank that holds
    it; and without `first_class` the sizes of the slices. Backward exchanges nothing. Each rank gets the same loss and
    the gradient of its own logits, for an upstream gradient that is the same on every rank.

    Differs from one process only by rounding: with W ranks, logits :math:`z` and rounding unit :math:`u` (2^-24, in
    float64 2^-53), value and gradient by at most :math:`u (W + 8 + 4 \max |z|)` of themselves before they are rounded
    to the input's type. It can be differentiated once. Logits of a row that are all -inf on one rank have gradient 0.

    Args:
        input: `(N, C_r)`, this rank's logits; float32, float64, bfloat16 or float16.
        target: classes `(N)`, int64, numbered over all ranks; the same on every rank.
        ignore_index: rows with this class are ignored. Default: -100.
        reduction: `"none"`, `"mean"` (over the rows that count) or `"sum"`.
        logit_scale: multiplies the logits, > 0. Default: 1.
        softcap: bounds the logits. Default: none.
        first_class: the number of this rank's first class, given on every rank or on none. Default: the number of
            classes of the ranks before it, whose slices may be of any size.
        group: a process group. Default: all processes.

    Returns:
        A scalar, or for `"none"` a tensor `(N)`, of the input's type.

    Raises:
        TypeError, ValueError, RuntimeError: for invalid arguments, naming the argument. IndexError, on every rank: on
            the CPU for a target that is not exactly one rank's; on CUDA its loss is NaN.

    Source: Megatron-LM's vocabulary-parallel cross-entropy, https://arxiv.org/abs/1909.08053.
    """
    mode = check_reduction(reduction)
    check_group(group)
    check_tensors(input, target=target)
    check_floating("input", input)
    if input.dim() != 2:
        raise RuntimeError(f"input: expected (N, C_r), got shape {tuple(input.shape)}")
    rows, classes = input.shape
    valid, local, index = _targets(target, rows, classes, ignore_index, first_class, group)
    temperature, cap = _scales(logit_scale, softcap)
    stats = token_stats_by(_of_logits, input, index, temperature, valid, cap)
    return _loss(stats, valid, local, target, mode, input.dtype, group)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    first_class: int | None = None,
    group: Any = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    r"""Compute the vocabulary-parallel cross-entropy of the logits `input @ linear_weight.T + linear_bias`.

    Equal to `fastloss.functional.linear_cross_entropy` of the concatenated slices, with logits of one chunk of rows at
    a time. The ranks exchange what `cross_entropy` here does, and in backward add up the gradient of `input`, in
    float32 for half-precision dtypes, of which each rank's part is rounded once to the input's type. Its rounding is
    that of `cross_entropy` here and of the products. It can be differentiated once.

    Args:
        input: hidden states `(N, in_features)`, the same on every rank.
        linear_weight: this rank's slice, `(C_r, in_features)`.
        target: classes `(N)`, int64, numbered over all ranks; the same on every rank.
        linear_bias: this rank's slice, `(C_r)`. Default: none.
        reduction: `"none"`, `"mean"` (over the rows that count) or `"sum"`.
        ignore_index: rows with this class are ignored. Default: -100.
        logit_scale: multiplies the logits, > 0. Default: 1.
        softcap: bounds the logits. Default: none.
        first_class: the number of this rank's first class, given on every rank or on none. Default: the number of
            classes of the ranks before it, whose slices may be of any size.
        group: a process group. Default: all processes.
        max_extra_bytes: the most bytes that a pass may take here, as for `fastloss.functional.linear_token_stats`.

    Returns:
        A scalar, or for `"none"` a tensor `(N)`, of the input's type.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as for `cross_entropy` here.

    Source: Megatron-LM, https://arxiv.org/abs/1909.08053; chunks as in `fastloss.functional.linear_cross_entropy`.
    """
    mode = check_reduction(reduction)
    check_group(group)
    check_tensors(input, linear_weight=linear_weight, target=target)
    if input.dim() != 2:
        raise RuntimeError(f"input: expected (N, in_features), got shape {tuple(input.shape)}")
    rows, classes = input.shape[0], linear_weight.shape[0]
    valid, local, index = _targets(target, rows, classes, ignore_index, first_class, group)
    temperature, cap = _scales(logit_scale, softcap)
    input = sum_of_gradients(input, group)
    stats = linear_token_stats_by(
        _of_linear, input, linear_weight, index, temperature, linear_bias, valid, cap, max_extra_bytes
    )
    return _loss(stats, valid, local, target, mode, input.dtype, group)
