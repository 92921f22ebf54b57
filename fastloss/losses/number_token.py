"""Losses that know the values of number tokens.

Those without a cross-entropy take the number tokens' logits, or, where their probability in the whole vocabulary
counts, their log-probabilities from `token_stats`, at the cost of one read of the vocabulary. The rest is arithmetic on
[rows, number tokens].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS
from fastloss._ops.checks import (
    call_with_classes,
    check_floating,
    check_integer,
    check_number,
    check_reduction,
    check_tensor,
    check_tensors,
)
from fastloss._ops.dtypes import autocast_to_fp32
from fastloss._ops.reductions import running_sums
from fastloss._ops.rowwise import NumberOp
from fastloss.losses.token_statistics import log_probs_of

__all__ = ["cross_entropy_with_number_token_loss", "gaussian_cross_entropy", "number_token_loss"]


KINDS = ("wasserstein", "mse")


def _of_operator(
    input, target, ids, table, max_distance, position, number_weight, ignore_index, reduction, label_smoothing, z_loss,
    squared, reweigh,
):  # fmt: skip
    dim = 1 if input.dim() > 1 else 0
    z = input.float() if input.dtype in HALF_TYPES else input
    plain = reference.cross_entropy(z, target, ignore_index=ignore_index, reduction="none")
    counts = number_weight != 0
    z = torch.where(counts.unsqueeze(-1), z.movedim(dim, -1), 0.0)
    logp = z.log_softmax(-1).index_select(-1, ids)
    loss = (logp.softmax(-1) * table[position]).sum(-1)
    if squared:
        loss = loss.square()
    if reweigh:
        mass = logp.exp().sum(-1)
        loss = loss * mass + max_distance * (1 - mass)
    each = plain + torch.where(counts, number_weight * loss, 0.0)
    if reduction == "none":
        return each
    return each.sum() / (target != ignore_index).sum() if reduction == "mean" else each.sum()


_cross_entropy_numbers = NumberOp("cross_entropy_numbers", _of_operator)


def _check_classes(name: str, logits: Tensor, label_name: str, labels: Tensor, rows: Sequence[int]) -> None:
    check_tensor(name, logits)
    if logits.dim() == 0:
        raise RuntimeError(f"{name}: expected at least one dimension")
    check_floating(name, logits)
    check_tensors(logits, **{label_name: labels})
    if labels.dtype != torch.int64:
        raise RuntimeError(f"{label_name}: expected classes of type int64, got {labels.dtype}")
    if labels.shape != rows:
        raise RuntimeError(f"{label_name}: expected shape {tuple(rows)}, got {tuple(labels.shape)}")


def _check_tokens(logits: Tensor, token_ids: Tensor, token_values: Tensor) -> Tensor:
    """Check the number tokens; return their values in the dtype of the computation."""
    check_tensors(logits, token_ids=token_ids, token_values=token_values)
    if token_ids.dtype != torch.int64 or token_ids.dim() != 1 or token_ids.numel() == 0:
        raise RuntimeError(
            f"token_ids: expected (D) classes of type int64, got {token_ids.dtype} {token_ids.shape}"
        )
    check_floating("token_values", token_values)
    if token_values.shape != token_ids.shape:
        raise RuntimeError(
            f"token_values: expected one number for each of {token_ids.numel()} token_ids, got {token_values.shape}"
        )
    return token_values.to(torch.float32 if logits.dtype in HALF_TYPES else logits.dtype)


def _reduced(loss: Tensor, counts: Tensor, mode: str, min_count: int) -> Tensor:
    if mode == "none":
        return loss
    return loss.sum() if mode == "sum" else loss.sum() / counts.sum().clamp(min=min_count)


def _typed(loss: Tensor, logits: Tensor) -> Tensor:
    return loss if autocast_to_fp32(logits) else loss.to(logits.dtype)


def _number_labels(labels: Tensor, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return which labels are number tokens, and their values."""
    match = labels.unsqueeze(-1) == ids
    return match.any(-1), torch.where(match, values, 0.0).sum(-1)


def _distances(
    values: Tensor, y: Tensor, kind: str, squash_factor: float | None, largest: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the distance of each value from each of `y`, [..., D], and the largest loss if it is asked for."""
    difference = values - y.unsqueeze(-1)
    if not largest and squash_factor is None:
        return (difference.abs() if kind == "wasserstein" else difference), None
    gaps = (difference if y is values else values - values.unsqueeze(-1)).abs()
    max_gap = gaps.amax()
    if kind != "wasserstein":
        return difference, max_gap.square()
    distance = gaps if y is values else difference.abs()
    if squash_factor is None:
        return distance, max_gap
    min_gap = torch.where(gaps == 0, torch.inf, gaps).amin()
    several = max_gap > min_gap  # else all different values have the distance 1
    scale = torch.where(several, (squash_factor - 1) / torch.where(several, max_gap - min_gap, 1.0), 0.0)
    distance = torch.where(distance == 0, 0.0, 1 + torch.where(several, distance - min_gap, 0.0) * scale)
    if not largest:
        return distance, None
    return distance, torch.where(several, squash_factor, 1.0).to(distance.dtype)


def _mean_of(x: Tensor, logp: Tensor) -> Tensor:
    """Return the mean of x, [..., D], over the softmax of the number tokens' log-probabilities.

    The sum is over the differences from the x of the most probable token: for a confident row it is small, and so is
    the rounding error of the gradient, which takes the difference of x and the mean.
    """
    pivot = x.gather(-1, logp.argmax(-1, keepdim=True)).detach()
    return (logp.softmax(-1) * (x - pivot)).sum(-1) + pivot.squeeze(-1)


def _number_rows(
    logp: Tensor, y: Tensor, values: Tensor, kind: str, reweigh: bool, squash_factor: float | None
) -> Tensor:
    """Return the row losses from the log-probabilities of the number tokens, [..., D]."""
    distance, max_distance = _distances(values, y, kind, squash_factor, reweigh)
    loss = _mean_of(distance, logp)
    if kind == "mse":
        loss = loss.square()
    if max_distance is not None:
        mass = logp.exp().sum(-1)
        loss = loss * mass + 1.01 * max_distance * (1 - mass)
    return loss


def _soft_rows(logp: Tensor, p: Tensor, values: Tensor, kind: str, reweigh: bool) -> Tensor:
    """Return the row losses for labels that are distributions over the number tokens, [..., D].

    The Wasserstein distance is the area between the distribution functions.
    """
    ascending, order = values.sort()
    max_distance = ascending[-1] - ascending[0]
    if kind == "wasserstein":
        difference = logp.softmax(-1) - p
        areas = running_sums(difference.index_select(-1, order)[..., :-1]).abs() * ascending.diff()
        loss = areas.sum(-1)
    else:
        error = _mean_of(values.expand_as(logp), logp) - (p * values).sum(-1)
        loss, max_distance = error.square(), max_distance.square()
    if reweigh:
        mass = logp.exp().sum(-1)
        loss = loss * mass + 1.01 * max_distance * (1 - mass)
    return loss


class _Pick(Function):
    """Selects the logits of classes, [..., D]. Backward gathers by `place`: no float atomics."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, ids: Tensor, place: Tensor) -> Tensor:
        return logits.index_select(-1, ids)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        return _Spread.apply(grad, *ctx.saved_tensors), None, None


class _Spread(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(picked: Tensor, ids: Tensor, place: Tensor) -> Tensor:
        return F.pad(picked, (0, 1)).index_select(-1, place)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        return _Pick.apply(grad, *ctx.saved_tensors), None, None


def _places(ids: Tensor, classes: int) -> Tensor:
    """Return the position of each class among the D ids, or D."""
    ordered, order = ids.sort()
    every = torch.arange(classes, device=ids.device)
    at = torch.searchsorted(ordered, every).clamp(max=len(ids) - 1)
    return torch.where(ordered[at] == every, order[at], len(ids))


def _picked(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the logits of these classes, [..., D].

    A class out of bounds raises on the CPU and gives NaN on CUDA, where to check would synchronise.
    """
    if ids.is_cpu:
        try:
            return logits.index_select(-1, ids)
        except (IndexError, RuntimeError) as error:
            raise IndexError(f"token_ids: {error}") from None
    return _picked_on_device(logits, ids)


def _picked_on_device(logits: Tensor, ids: Tensor) -> Tensor:
    inside = (ids >= 0) & (ids < logits.shape[-1])
    picked = _Pick.apply(logits, torch.where(inside, ids, 0), _places(ids, logits.shape[-1]))
    return torch.where(inside, picked, torch.nan)


def _check_options(kind: str, reduction: str, squash_factor: float | None) -> float | None:
    """Check the options; return the squash factor."""
    check_reduction(reduction)
    if kind not in KINDS:
        raise ValueError(f"kind: expected 'wasserstein' or 'mse', got {kind!r}")
    if squash_factor is not None:
        if kind != "wasserstein":
            raise ValueError("squash_factor: only with kind='wasserstein'")
        squash_factor = check_number("squash_factor", squash_factor)
        if squash_factor <= 1:
            raise ValueError(f"squash_factor: expected a number above 1, got {squash_factor}")
    return squash_factor


def number_token_loss(
    logits: Tensor,
    labels: Tensor,
    token_ids: Tensor,
    token_values: Tensor,
    kind: str = "wasserstein",
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    reweigh: bool = False,
    squash_factor: float | None = None,
) -> Tensor:
    r"""Compute the distance between predicted and true numbers, at positions whose label is a number token.

    With :math:`q` the softmax over the number tokens alone, :math:`v` their values and :math:`v_y` the label's:

    .. math:: \mathrm{wasserstein:}\ \sum_k q_k |v_k - v_y|, \qquad
              \mathrm{mse:}\ \left(\sum_k q_k v_k - v_y\right)^2 .

    The first is the Wasserstein-1 distance to a one-hot label for any spacing of the values. With labels that are
    distributions :math:`p` over the number tokens it is that distance in general, over the values in ascending order

    .. math:: \sum_k \left|\sum_{i \le k} (q_i - p_i)\right| (v_{k+1} - v_k) ,

    and the squared error is :math:`(\sum_k q_k v_k - \sum_k p_k v_k)^2`. Rows whose label is no number, or all zeros,
    are not read and have no gradient.

    Args:
        logits: `[..., V]`, such as `[N, V]` or `[B, T, V]`; float32, float64, bfloat16 or float16.
        labels: `[...]`, int64, aligned with the logits; or `[..., D]`, floating point: the probability of each
            of the number tokens.
        token_ids: `(D)`, int64, the number tokens, each once.
        token_values: `(D)`, their values.
        kind: `"wasserstein"` or `"mse"`. Default: `"wasserstein"`.
        ignore_index: this label never counts. Default: -100.
        reduction: `"none"`, `"sum"` or `"mean"`, over the positions whose label is a number token; 0 if there are
            none. Default: `"mean"`.
        reweigh: multiply by the mass `m` that the full softmax gives to number tokens and add
            1.01 max_dist (1 - m), where max_dist is the largest possible loss. Default: False, as in the paper.
        squash_factor: > 1, maps the distances of different values linearly to [1, `squash_factor`]; not with labels
            that are distributions. Default: none.

    Returns:
        A scalar, or for `"none"` a tensor of shape `[...]`, of the logits' type (float32 for half-precision dtypes
        under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: for invalid arguments, naming the argument.

    Source: Zausinger et al., Regress, Don't Guess, https://arxiv.org/abs/2411.02083; `reweigh` and `squash_factor`
    of ntloss 0.3.2.
    """
    check_tensor("logits", logits)
    soft = isinstance(labels, Tensor) and labels.is_floating_point()
    shape = getattr(logits, "shape", torch.Size())[:-1]
    if not soft:
        _check_classes("logits", logits, "labels", labels, shape)
    values = _check_tokens(logits, token_ids, token_values)
    squash_factor = _check_options(kind, reduction, squash_factor)
    ignore_index = check_integer("ignore_index", ignore_index)
    if soft:
        check_floating("logits", logits)
        check_tensors(logits, labels=labels)
        if labels.shape != (*shape, len(values)):
            raise RuntimeError(
                f"labels: expected classes of shape {tuple(shape)}, or probabilities of shape "
                f"{(*shape, len(values))}, got {tuple(labels.shape)}"
            )
        if squash_factor is not None:
            raise ValueError("squash_factor: expected labels that are classes")
        counts = (labels != 0).any(-1)
    else:
        is_number, y = _number_labels(labels, token_ids, values)
        counts = is_number & (labels != ignore_index)
    if reweigh:
        logp = log_probs_of(logits, token_ids.expand(*shape, -1), counts, index_name="token_ids")
    else:  # the softmax over the number tokens is that of their logits: no other class is read
        logp = torch.where(counts.unsqueeze(-1), _picked(logits, token_ids).to(values.dtype), 0.0)
    if soft:
        rows = _soft_rows(logp, labels.to(values.dtype), values, kind, reweigh)
    else:
        rows = _number_rows(logp, y, values, kind, reweigh, squash_factor)
    return _typed(_reduced(torch.where(counts, rows, 0.0), counts, reduction, 1), logits)


def cross_entropy_with_number_token_loss(
    logits: Tensor,
    labels: Tensor,
    token_ids: Tensor,
    token_values: Tensor,
    ntl_weight: float = 0.3,
    kind: str = "wasserstein",
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    reweigh: bool = False,
    squash_factor: float | None = None,
) -> Tensor:
    r"""Compute cross-entropy + `ntl_weight` * `number_token_loss`, both from one read of the vocabulary.

    .. math:: -\log p_y + \lambda\, \mathrm{NTL}

    The mean of the first is over the labels that are not ignored, that of the second over those that are number
    tokens. The mass of the number tokens comes from the log-sum-exp of the cross-entropy.

    Args:
        logits: `[..., V]`, such as `[N, V]` or `[B, T, V]`; float32, float64, bfloat16 or float16.
        labels: `[...]`, int64, aligned with the logits.
        token_ids, token_values: `(D)`, the number tokens and their values.
        ntl_weight: :math:`\lambda`. Default: 0.3.
        kind, reweigh, squash_factor: as for `number_token_loss`.
        ignore_index: rows with this label are ignored and have no gradient. Default: -100.
        reduction: `"none"`, `"sum"` or `"mean"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of shape `[...]`, of the logits' type (float32 for half-precision dtypes
        under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: for invalid arguments, naming the argument.

    Source: Zausinger et al., https://arxiv.org/abs/2411.02083.
    """
    _check_classes("logits", logits, "labels", labels, getattr(logits, "shape", ())[:-1])
    values = _check_tokens(logits, token_ids, token_values)
    squash_factor = _check_options(kind, reduction, squash_factor)
    ignore_index = check_integer("ignore_index", ignore_index)
    weight = check_number("ntl_weight", ntl_weight)
    ids, order = token_ids.sort()
    ascending = values[order]
    distance, max_distance = _distances(ascending, ascending, kind, squash_factor, reweigh)
    # the kernel reads the largest loss only to reweigh
    max_distance = distance[0, 0] if max_distance is None else 1.01 * max_distance
    valid = labels != ignore_index
    # of the last id that is not larger, or 0
    position = torch.searchsorted(ids[1:].contiguous(), labels.contiguous(), right=True)
    is_number = (ids[position] == labels) & valid
    if reduction == "mean":  # the mean over number tokens, of a sum divided by all labels
        labels_of_each = valid.sum(dtype=values.dtype) / is_number.sum().clamp(min=1)
        number_weight = is_number * (labels_of_each * weight)
    else:
        number_weight = is_number.to(values.dtype) * weight
    # as a matrix where that needs no copy
    flat = logits.dim() < 3 or logits.is_contiguous()
    rows = (
        logits.flatten(0, -2) if flat and logits.dim() > 1 else logits.movedim(-1, min(1, logits.dim() - 1))
    )
    if flat:
        labels, position, number_weight = (
            t.flatten() if logits.dim() > 1 else t for t in (labels, position, number_weight)
        )
    hparams = _cross_entropy_numbers.pack(
        label_smoothing=0.0, z_loss=0.0, squared=float(kind == "mse"), reweigh=float(reweigh)
    )
    tensors = rows, labels, ids, distance, max_distance, position, number_weight
    loss = call_with_classes(
        "labels or token_ids",
        _cross_entropy_numbers,
        tensors,
        (ignore_index, REDUCTIONS[reduction], hparams, autocast_to_fp32(logits)),
    )
    return loss.view(logits.shape[:-1]) if reduction == "none" else loss


def gaussian_cross_entropy(
    input: Tensor,
    target: Tensor,
    sigma: float = 1.0,
    token_ids: Tensor | None = None,
    token_values: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute cross-entropy with the target spread like a Gaussian over neighbouring classes or number tokens.

    .. math:: -\sum_c q_c \log p_c, \qquad q_c \propto e^{-(v_c - v_y)^2 / 2 \sigma^2}

    where :math:`v_c = c` is the class itself, or, with `token_ids`, the value of a number token: then the target is
    spread over these alone, and rows whose target is another token have plain cross-entropy. Only the classes that
    the target reaches are looked up (to 9 sigma), after one read of the logits.

    Args:
        input: logits `(C)`, `(N, C)` or `(N, C, d1, ...)`; float32, float64, bfloat16 or float16.
        target: classes, int64, of the input's shape without `C`.
        sigma: the width, in classes or in units of the values; 0 gives cross-entropy. Default: 1.
        token_ids, token_values: `(D)`, the number tokens and their values. Default: the classes themselves.
        ignore_index: rows with this class are ignored and have no gradient. Default: -100.
        reduction: `"none"`, `"sum"` or `"mean"`, over the rows that are not ignored. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the target's shape, of the input's type (float32 for half-precision dtypes
        under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: for invalid arguments, naming the argument.

    Source: the label smoother of https://github.com/tum-ai/number-token-loss, without its epsilon in the norm.
    """
    dim = 1 if getattr(input, "ndim", 0) > 1 else 0
    shape = getattr(input, "shape", torch.Size())
    _check_classes("input", input, "target", target, shape[:dim] + shape[dim + 1 :])
    check_reduction(reduction)
    width = check_number("sigma", sigma, low=0.0)
    if (token_ids is None) != (token_values is None):
        raise ValueError("token_ids and token_values: expected both or neither")
    logits = input.movedim(dim, -1)
    valid = target != check_integer("ignore_index", ignore_index)
    label = torch.where(valid, target, 0).unsqueeze(-1)
    like = torch.float32 if input.dtype in HALF_TYPES else input.dtype
    if width == 0:
        index, q = label, torch.ones(label.shape, dtype=like, device=input.device)
    elif token_ids is None:
        classes = input.shape[dim]
        reach = min(math.ceil(9 * width), classes - 1)
        offset = torch.arange(-reach, reach + 1, device=input.device)
        index = label + offset
        inside = (index >= 0) & (index < classes)
        log_q = torch.where(inside, -0.5 * (offset.to(like) / width) ** 2, -torch.inf)
        index, q = torch.where(inside, index, label), log_q.softmax(-1)
    else:
        values = _check_tokens(input, token_ids, token_values)
        is_number, y = _number_labels(label.squeeze(-1), token_ids, values)
        is_number = is_number.unsqueeze(-1)
        gaussian = (-0.5 * ((values - y.unsqueeze(-1)) / width) ** 2).softmax(-1)
        index = torch.cat([label, token_ids.expand(*target.shape, -1)], -1)
        q = torch.cat([(~is_number).to(like), torch.where(is_number, gaussian, 0.0)], -1)
    logp = log_probs_of(logits, index, valid, index_name="target or token_ids")
    loss = -torch.where(q > 0, q * logp, 0.0).sum(-1)
    return _typed(_reduced(loss, valid, reduction, 0), input)
