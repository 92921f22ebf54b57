"""Log-probabilities, entropy and other statistics of rows of logits, in one read of the vocabulary."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops import abi
from fastloss._ops.autograd import REDUCTIONS, Differentiable, Op
from fastloss._ops.checks import (
    call_with_classes,
    check_floating,
    check_integer,
    check_number,
    check_tensor,
    check_tensors,
)
from fastloss._ops.chunked_linear import extra_bytes
from fastloss._ops.chunked_linear_stats import LinearStatsAttrs, LinearStatsInputs, LinearStatsOp
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.elementwise import NO_INDEX
from fastloss._ops.rowwise import like_last_rows, state_width
from fastloss.losses.classification import cross_entropy_rows
from fastloss.losses.linear import as_autocast, check_linear

__all__ = [
    "entropy_from_logits",
    "linear_token_stats",
    "selective_log_softmax",
    "sequence_log_probs",
    "token_stats",
]


STATISTICS = abi.fact("token_stats", "outputs")
"""The outputs of a row: entropy, lse, log_sum_p2, mean_logit, then K log-probabilities, then K flags."""
LSE = 1
"""The place of the log-sum-exp among them."""


class TokenStats(NamedTuple):
    """The result of `token_stats`: each of the shape of the rows, `logp` and `is_top1` of the index's shape."""

    logp: Tensor | None
    entropy: Tensor
    lse: Tensor
    log_sum_p2: Tensor
    mean_logit: Tensor
    is_top1: Tensor | None


def _as_outputs(s: Any, index: Tensor | None, everything: bool) -> Tensor:
    """Stack the reference's statistics as the operators' outputs, [4 + 2 K, ...]."""
    nothing = torch.zeros_like(s.entropy)
    outputs = (
        [s.entropy, s.lse, s.log_sum_p2, s.mean_logit] if everything else [s.entropy, s.lse, nothing, nothing]
    )
    if index is not None:
        outputs += [*s.logp.unbind(-1), *s.is_top1.to(s.entropy.dtype).unbind(-1)]
    return torch.stack(outputs)


def _reference(logits, index, mask, scale, cap, everything):
    s = reference.token_stats(logits, index, 1 / scale, mask=mask, softcap=cap / scale if cap else None)
    return _as_outputs(s, index, everything)


def _fake(logits, index, mask, scale, cap, everything):
    acc_dtype = accumulation_dtype(logits.dtype)
    rows = list(logits.shape[:-1])
    count = 1
    for size in rows:
        count = count * size
    outputs = STATISTICS + (2 * index.shape[-1] if index is not None else 0)
    return logits.new_empty([outputs, *rows], dtype=acc_dtype), logits.new_empty(
        [count, state_width("token_stats")], dtype=acc_dtype
    )


stats_of_logits = Op("token_stats", _reference, _fake, tensors=3, gradient_like=like_last_rows)


def _check(logits: Tensor, index: Tensor | None, mask: Tensor | None, index_name: str = "index") -> None:
    check_tensor("logits", logits)
    if logits.dim() == 0:
        raise RuntimeError("logits: expected [..., V], got a tensor without dimensions")
    check_floating("logits", logits)
    check_tensors(logits, **{index_name: index, "mask": mask})
    rows = logits.shape[:-1]
    if index is not None:
        if index.dtype != torch.int64:
            raise RuntimeError(f"{index_name}: expected classes of type int64, got {index.dtype}")
        if index.shape[: len(rows)] != rows or index.dim() not in (len(rows), len(rows) + 1):
            raise RuntimeError(
                f"{index_name}: expected shape {tuple(rows)} or {(*rows, 'K')} for logits of shape "
                f"{tuple(logits.shape)}, got {tuple(index.shape)}"
            )
    if mask is not None and mask.shape != rows:
        raise RuntimeError(f"mask: expected shape {tuple(rows)}, got {tuple(mask.shape)}")


def _call_stats(
    logits: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    everything: bool,
    index_name: str = "index",
    op: Differentiable = stats_of_logits,
) -> Tensor:
    scale = 1 / check_number("temperature", temperature, low=math.ulp(0.0))
    cap = 0.0 if softcap is None else check_number("softcap", softcap, low=math.ulp(0.0)) * scale
    if index is not None and index.dim() < logits.dim():
        index = index.unsqueeze(-1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach() != 0
    return call_with_classes(index_name, op, (logits, index, mask), (scale, cap, everything))


def log_probs_of(
    logits: Tensor, index: Tensor, mask: Tensor | None, temperature: float = 1.0, index_name: str = "index"
) -> Tensor:
    """Return the log-probabilities of the classes `index` [..., K]; 0 in rows where `mask` is False."""
    outputs = _call_stats(logits, index, mask, temperature, None, False, index_name)
    return outputs[STATISTICS : STATISTICS + index.shape[-1]].movedim(0, -1)


def _named(outputs: Tensor, index: Tensor | None) -> TokenStats:
    """Return the outputs [4 + 2 K, ...] by name."""
    logp = is_top1 = None
    if index is not None:
        several = outputs[STATISTICS:].movedim(0, -1)
        count = several.shape[-1] // 2
        logp, is_top1 = (
            several[..., :count].reshape(index.shape),
            several[..., count:].detach().reshape(index.shape) > 0,
        )
    entropy, lse, log_sum_p2, mean_logit = outputs[:STATISTICS].unbind(0)
    return TokenStats(logp, entropy, lse, log_sum_p2, mean_logit, is_top1)


def label_log_probs(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int | None,
    temperature: float,
    labels_name: str,
) -> Tensor:
    """Return the log-probability of each row's label [...]; 0 where it is `ignore_index`, a row that is not read.

    It is the negative cross-entropy, which keeps the label's class apart from the sum over the others.
    """
    scale = 1 / check_number("temperature", temperature, low=math.ulp(0.0))
    ignored = NO_INDEX if ignore_index is None else check_integer("ignore_index", ignore_index)
    rows, target = logits, labels
    if logits.dim() > 2:
        flat = logits.is_contiguous()
        rows = logits.reshape(-1, logits.shape[-1]) if flat else logits.movedim(-1, 1)
        target = labels.reshape(-1) if flat else labels
    nll = call_with_classes(
        labels_name,
        cross_entropy_rows,
        (rows, target, None, None),
        (
            ignored,
            REDUCTIONS["none"],
            scale,
            0.0,
            cross_entropy_rows.pack(label_smoothing=0.0, z_loss=0.0),
            True,
        ),
    )
    return -nll.reshape(labels.shape)


def token_stats(
    logits: Tensor,
    index: Tensor | None = None,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> TokenStats:
    r"""Compute log-probabilities, entropy and other statistics of logits from one read, with a joint backward.

    With :math:`z = c \tanh(x / c) / T` (temperature `T`, softcap `c`; without softcap :math:`z = x / T`) and
    :math:`p = \mathrm{softmax}(z)`:

    .. math:: \mathrm{logp}_k = \log p_k, \quad \mathrm{entropy} = -\sum_j p_j \log p_j, \quad
              \mathrm{lse} = \log \sum_j e^{z_j}, \quad \log \sum_j p_j^2, \quad
              \mathrm{mean\_logit} = \tfrac{1}{V} \sum_j z_j .

    The backward pass reads the logits once and writes their gradient once, whatever the upstream gradients of the
    first five are. No probabilities are stored. A logit of -inf has probability 0 and adds nothing to the entropy.
    The mean of the logits under `p` is `lse - entropy`.

    Args:
        logits: `[..., V]`; float32, float64, bfloat16 or float16. Leading dimensions may be strided, as those of
            `logits[:, :-1]` are, without a copy.
        index: classes, int64, `[...]` or `[..., K]`; the same class may stand there more than once.
        temperature: `T` > 0. Default: 1.
        mask: `[...]`, rows where it is 0 (False) are not read: their results are 0 and they have no gradient.
        softcap: `c` > 0, bounds the logits (Gemma 2). Default: none.

    Returns:
        The named tuple `(logp, entropy, lse, log_sum_p2, mean_logit, is_top1)`, of shape `[...]` each, `logp` and
        `is_top1` of the index's shape (None without an index), float32 for half-precision dtypes. `is_top1` says
        whether no class is more probable.

    Raises:
        TypeError, ValueError, RuntimeError: for invalid arguments, naming the argument.
        IndexError: on the CPU for a class out of bounds; on CUDA that has `logp` NaN.

    Source: the joint form of TRL's `selective_log_softmax` and `entropy_from_logits`; the sum of squared
    probabilities for WPO, https://arxiv.org/abs/2406.11827.
    """
    return token_stats_by(stats_of_logits, logits, index, temperature, mask, softcap)


def token_stats_by(
    op: Differentiable,
    logits: Tensor,
    index: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    softcap: float | None,
) -> TokenStats:
    """Return `token_stats` as computed by `op`."""
    _check(logits, index, mask)
    return _named(_call_stats(logits, index, mask, temperature, softcap, True, op=op), index)


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Compute log-probabilities of chosen classes, :math:`z_k - \log \sum_j e^{z_j}` with :math:`z = x / T`.

    One read of the logits; nothing of their shape is stored. Right for any margin: the log-probability of a class
    that has all but :math:`e^{-80}` of the probability keeps its relative precision.

    Args:
        logits: `[..., V]`; float32, float64, bfloat16 or float16.
        index: classes, int64, of shape `[...]` or `[..., K]`.
        temperature: `T` > 0. Default: 1.

    Returns:
        A tensor of the shape of `index`, float32 for half-precision dtypes.

    Raises:
        TypeError, ValueError, RuntimeError: as for `token_stats`.

    Source: TRL's `selective_log_softmax`, https://github.com/huggingface/trl.
    """
    _check(logits, index, None)
    if index.dim() < logits.dim():
        return label_log_probs(logits, index, None, temperature, "index")
    return log_probs_of(logits, index, None, temperature)


def entropy_from_logits(logits: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""Compute the entropy of each row, :math:`-\sum_j p_j \log p_j` in nats with :math:`p = \mathrm{softmax}(x / T)`.

    One read of the logits; a logit of -inf adds nothing.

    Args:
        logits: `[..., V]`; float32, float64, bfloat16 or float16.
        temperature: `T` > 0. Default: 1.
        mask: `[...]`, rows where it is 0 (False) are not read: their entropy is 0 and they have no gradient.

    Returns:
        A tensor of shape `[...]`, float32 for half-precision dtypes.

    Raises:
        TypeError, ValueError, RuntimeError: as for `token_stats`.

    Source: TRL's `entropy_from_logits`, https://github.com/huggingface/trl.
    """
    _check(logits, None, mask)
    return _call_stats(logits, None, mask, temperature, None, False)[0]


def sequence_log_probs(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    average: bool = False,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""Compute each sequence's log-probability, :math:`\sum_t \log p_t(y_t)` over the labels that are not ignored.

    Logits and labels are aligned: `labels[:, t]` is what `logits[:, t]` predicts. The logits are read once forward
    and once backward; rows that are ignored are not read.

    Args:
        logits: `[..., T, V]`, usually `[B, T, V]`; float32, float64, bfloat16 or float16.
        labels: `[..., T]`, int64.
        ignore_index: the label of tokens that do not count. Default: -100.
        average: divide by the number of tokens that count. Default: False.
        temperature: divides the logits. Default: 1.

    Returns:
        A tensor of shape `[...]` (`[B]`), float32 for half-precision dtypes; 0 for a sequence whose labels are all
        ignored.

    Raises:
        TypeError, ValueError, RuntimeError: as for `token_stats`, with `labels` for its `index`.

    Source: the log-probabilities of Rafailov et al., Direct Preference Optimization, https://arxiv.org/abs/2305.18290.
    """
    _check(logits, labels, None, "labels")
    if labels.dim() == 0 or labels.dim() == logits.dim():
        raise RuntimeError(f"labels: expected shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    total = label_log_probs(logits, labels, ignore_index, temperature, "labels").sum(-1)
    return total / (labels != ignore_index).sum(-1).clamp(min=1) if average else total


def _linear_reference(inputs: LinearStatsInputs, attrs: LinearStatsAttrs) -> Tensor:
    scale, cap, everything, _ = attrs
    s = reference.linear_token_stats(
        inputs.input, inputs.linear_weight, inputs.index, 1 / scale, linear_bias=inputs.linear_bias, mask=inputs.mask,
        softcap=cap / scale if cap else None,
    )  # fmt: skip
    return _as_outputs(s, inputs.index, everything)


stats_of_linear = LinearStatsOp("linear_token_stats", _linear_reference)


def _call_linear_stats(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, index: Tensor | None, mask: Tensor | None,
    temperature: float, softcap: float | None, everything: bool, max_extra_bytes: int | None,
    names: tuple[str, str] = ("input", "index"), op: Differentiable = stats_of_linear,
) -> Tensor:  # fmt: skip
    """Return the outputs [4 + 2 K, rows] for hidden states [rows, in_features] and index [rows, K]."""
    scale = 1 / check_number("temperature", temperature, low=math.ulp(0.0))
    cap = 0.0 if softcap is None else check_number("softcap", softcap, low=math.ulp(0.0)) * scale
    return call_with_classes(
        names[1],
        op,
        LinearStatsInputs(input, linear_weight, linear_bias, index, mask),
        LinearStatsAttrs(
            logit_scale=scale,
            softcap=cap,
            everything=everything,
            max_extra_bytes=extra_bytes(max_extra_bytes),
        ),
    )


def _check_hidden(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, name: str = "input"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check and return the arguments, cast for autocast, with hidden states as rows."""
    check_tensor(name, input)
    if input.dim() == 0:
        raise RuntimeError(f"{name}: expected [..., in_features], got a tensor without dimensions")
    check_tensors(input, linear_weight=linear_weight, linear_bias=linear_bias)
    if linear_weight.dim() != 2:
        raise RuntimeError(
            f"linear_weight: expected (C, in_features), got shape {tuple(linear_weight.shape)}"
        )
    rows = (
        input.reshape(-1, input.shape[-1])
        if input.shape[-1]
        else input.new_empty(input.shape[:-1].numel(), 0)
    )
    rows, linear_weight, linear_bias = as_autocast(input.device.type, rows, linear_weight, linear_bias)
    check_linear(rows, linear_weight, linear_bias)
    return rows, linear_weight, linear_bias


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor | None = None,
    temperature: float = 1.0,
    *,
    linear_bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    max_extra_bytes: int | None = None,
) -> TokenStats:
    r"""Compute the statistics of `token_stats` for the logits `input @ linear_weight.T + linear_bias`, in chunks.

    The formulas are those of `token_stats`. Logits are computed for a chunk of rows, read once, and computed again in
    backward; only six numbers per row are kept in between. Beyond the gradients that takes at most 128 MiB (while one
    row of logits is smaller than that; on CUDA as much as the weight has twice in float32, if that is more, up to 1
    GiB). For DPO, KTO, GRPO and other losses of log-probabilities over a large vocabulary.

    Args:
        input: hidden states `[..., in_features]`; float32, float64, bfloat16 or float16.
        linear_weight: `(C, in_features)`, of the input's type.
        index: classes, int64, `[...]` or `[..., K]`.
        temperature: `T` > 0, divides the logits. Default: 1.
        linear_bias: `(C)`. Default: none.
        mask: `[...]`, rows where it is 0 (False) have results 0 and no gradient; on the CPU they are left out of the
            products.
        softcap: `c` > 0, bounds the logits (Gemma 2). Default: none.
        max_extra_bytes: the most bytes that a pass may take beyond the gradients, for the logits of a chunk and their
            gradient, as for `linear_cross_entropy`. Default: as above.

    Returns:
        The named tuple `(logp, entropy, lse, log_sum_p2, mean_logit, is_top1)` of `token_stats`, float32 for half
        types.

    Raises:
        TypeError, ValueError, RuntimeError: for invalid arguments, naming the argument.
        IndexError: on the CPU for a class out of bounds; on CUDA that has `logp` NaN.

    Source: the statistics of `token_stats` in chunks of rows, as in Liger, https://arxiv.org/abs/2410.10989.
    """
    return linear_token_stats_by(
        stats_of_linear, input, linear_weight, index, temperature, linear_bias, mask, softcap, max_extra_bytes
    )


def linear_token_stats_by(
    op: Differentiable,
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor | None,
    temperature: float,
    linear_bias: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    max_extra_bytes: int | None,
) -> TokenStats:
    """Return `linear_token_stats` as computed by `op`."""
    rows, linear_weight, linear_bias = _check_hidden(input, linear_weight, linear_bias)
    shape = input.shape[:-1]
    check_tensors(input, index=index, mask=mask)
    several = None
    if index is not None:
        if index.dtype != torch.int64:
            raise RuntimeError(f"index: expected classes of type int64, got {index.dtype}")
        if index.shape[: len(shape)] != shape or index.dim() not in (len(shape), len(shape) + 1):
            raise RuntimeError(
                f"index: expected shape {tuple(shape)} or {(*shape, 'K')} for hidden states of shape "
                f"{tuple(input.shape)}, got {tuple(index.shape)}"
            )
        count = index.shape[-1] if index.dim() > len(shape) else 1
        several = index.reshape(rows.shape[0], count)
    if mask is not None:
        if mask.shape != shape:
            raise RuntimeError(f"mask: expected shape {tuple(shape)}, got {tuple(mask.shape)}")
        mask = (mask.detach() != 0).reshape(-1)
    outputs = _call_linear_stats(
        rows, linear_weight, linear_bias, several, mask, temperature, softcap, True, max_extra_bytes, op=op
    )
    return _named(outputs.reshape(outputs.shape[0], *shape), index)


def linear_sequence_log_probs(
    hidden: dict[str, Tensor], labels: dict[str, Tensor], linear_weight: Tensor, linear_bias: Tensor | None,
    ignore_index: int, temperature: float, softcap: float | None, max_extra_bytes: int | None,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Return for each batch of sequences the sums of its labels' log-probabilities and the numbers of labels."""
    rows, index = [], []
    for (name, h), (of, y) in zip(hidden.items(), labels.items(), strict=True):
        check_tensor(name, h)
        if h.dim() != 3:
            raise RuntimeError(f"{name}: expected [B, T, in_features], got shape {tuple(h.shape)}")
        check_tensors(h, **{of: y})
        if y.shape != h.shape[:2] or y.dtype != torch.int64:
            raise RuntimeError(
                f"{of}: expected int64 classes of shape {tuple(h.shape[:2])}, got {y.dtype} {tuple(y.shape)}"
            )
        rows.append(h.reshape(-1, h.shape[-1]))
        index.append(y.reshape(-1))
    names = list(hidden)
    for name, h in zip(names[1:], rows[1:], strict=True):
        if h.shape[1] != rows[0].shape[1] or h.dtype != rows[0].dtype:
            raise RuntimeError(
                f"{name}: expected in_features and type of {names[0]}, {rows[0].shape[1]} and {rows[0].dtype}, "
                f"got {h.shape[1]} and {h.dtype}"
            )
    together, linear_weight, linear_bias = _check_hidden(
        torch.cat(rows), linear_weight, linear_bias, names[0]
    )
    every = torch.cat(index)
    valid = every != check_integer("ignore_index", ignore_index)
    outputs = _call_linear_stats(
        together, linear_weight, linear_bias, torch.where(valid, every, 0).unsqueeze(1), valid, temperature,
        softcap, False, max_extra_bytes, (names[0], next(iter(labels))),
    )  # fmt: skip
    sizes = [y.numel() for y in index]
    return [
        (p.view(y.shape).sum(1), v.view(y.shape).sum(1))
        for p, v, y in zip(outputs[STATISTICS].split(sizes), valid.split(sizes), labels.values(), strict=True)
    ]
