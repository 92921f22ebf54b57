"""Log-probabilities and entropy from hidden states, and preference losses of them, without the matrix of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._checks import check_number, check_tensors
from fastloss._linear_stats import LinearStatsOp
from fastloss._registry import Draw, Loss, register
from fastloss.linear import as_autocast, check_linear
from fastloss.preference_dpo import dpo_loss
from fastloss.reference.linear import logits_from
from fastloss.reference.statistics import TokenStats
from fastloss.statistics import STATISTICS, planes_of_reference, stats_of_planes

__all__ = ["linear_dpo_loss", "linear_token_stats"]


def _reference(input, linear_weight, linear_bias, index, mask, scale, cap, everything):
    return planes_of_reference(
        logits_from(input, linear_weight, linear_bias), index, mask, scale, cap, everything
    )


_stats = LinearStatsOp("linear_token_stats", _reference)


def _planes(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, index: Tensor | None, mask: Tensor | None,
    temperature: float, softcap: float | None, everything: bool, names: tuple[str, str] = ("input", "index"),
) -> Tensor:  # fmt: skip
    """As `token_stats`'s, [planes, rows], for rows of hidden states [rows, in_features] and index [rows, K]."""
    scale = 1 / check_number("temperature", temperature, low=math.ulp(0.0))
    cap = 0.0 if softcap is None else check_number("softcap", softcap, low=math.ulp(0.0)) * scale
    try:
        return _stats((input, linear_weight, linear_bias, index, mask), (scale, cap, everything))
    except RuntimeError as error:
        if "is out of bounds" in str(error):
            raise IndexError(f"{names[1]}: {error}") from None
        raise


def _check_rows(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, name: str = "input"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments in the type in which they are multiplied, hidden states as rows."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(input).__name__}")
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
) -> TokenStats:
    r"""Log-probabilities, entropy and other statistics of the logits `input @ linear_weight.T + linear_bias`.

    What `token_stats` gives for these logits (its formulas), which never exist all at once: they are made for a
    chunk of rows, read once, and made again in backward. Nothing but six numbers of a row is kept between. Beyond
    the gradients that takes at most 128 MiB (while one row of logits is smaller than that; on CUDA as much as the
    weight has twice in float32, if that is more, up to 1 GiB). For DPO, KTO, GRPO and whatever needs
    log-probabilities of a large vocabulary.

    Args:
        input: hidden states `[..., in_features]`; float32, float64, bfloat16 or float16.
        linear_weight: `(C, in_features)`, of the input's type.
        index: classes, int64, `[...]` or `[..., K]`.
        temperature: `T` > 0, divides the logits. Default: 1.
        linear_bias: `(C)`. Default: none.
        mask: `[...]`, rows where it is 0 (False) have results 0 and no gradient; on the CPU they are left out of the
            products.
        softcap: `c` > 0, bounds the logits (Gemma 2). Default: none.

    Returns:
        The named tuple `(logp, entropy, lse, log_sum_p2, mean_logit, is_top1)` of `token_stats`, float32 for half
        types.

    Raises:
        TypeError, ValueError, RuntimeError: for arguments of a wrong kind, naming it.
        IndexError: on the CPU for a class out of bounds; on CUDA that has `logp` NaN.

    Source: the statistics of `token_stats` in chunks of rows, as in Liger, https://arxiv.org/abs/2410.10989.
    """
    rows, linear_weight, linear_bias = _check_rows(input, linear_weight, linear_bias)
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
    planes = _planes(rows, linear_weight, linear_bias, several, mask, temperature, softcap, True)
    return stats_of_planes(planes.reshape(planes.shape[0], *shape), index)


def _sequence_log_probs(
    hidden: dict[str, Tensor], labels: dict[str, Tensor], linear_weight: Tensor, linear_bias: Tensor | None,
    ignore_index: int, temperature: float, softcap: float | None,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Of each batch of sequences: the sum of its labels' log-probabilities, and how many labels count."""
    rows, index = [], []
    for (name, h), (of, y) in zip(hidden.items(), labels.items(), strict=True):
        if not isinstance(h, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(h).__name__}")
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
    together, linear_weight, linear_bias = _check_rows(torch.cat(rows), linear_weight, linear_bias, names[0])
    every = torch.cat(index)
    valid = every != ignore_index
    planes = _planes(
        together, linear_weight, linear_bias, torch.where(valid, every, 0).unsqueeze(1), valid, temperature,
        softcap, False, (names[0], next(iter(labels))),
    )  # fmt: skip
    sizes = [y.numel() for y in index]
    return [
        (p.view(y.shape).sum(1), v.view(y.shape).sum(1))
        for p, v, y in zip(planes[STATISTICS].split(sizes), valid.split(sizes), labels.values(), strict=True)
    ]


def linear_dpo_loss(
    chosen_input: Tensor,
    rejected_input: Tensor,
    linear_weight: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    r"""Direct preference optimisation from hidden states, the logits computed in chunks.

    `dpo_loss` of the log-probabilities of whole answers, :math:`\sum_t \log \mathrm{softmax}(W h_t + b)_{y_t}` over
    the labels that are not ignored. Logits are made for a chunk of tokens, forward and again backward, chosen and
    rejected answers in one pass; beyond the gradients that takes what `linear_token_stats` takes. Labels are
    aligned: `chosen_labels[:, t]` is what `chosen_input[:, t]` predicts.

    Args:
        chosen_input: hidden states of the chosen answers, of shape `[B, T, in_features]`.
        rejected_input: those of the rejected ones, `[B, T', in_features]`, of the same type.
        linear_weight: `(C, in_features)`, of the input's type.
        chosen_labels: int64, `[B, T]`.
        rejected_labels: int64, `[B, T']`.
        reference_chosen_logps: `[B]`, the reference model's, for example from `linear_token_stats`; as a constant
            or with a gradient of its own.
        reference_rejected_logps: `[B]`.
        beta: strength of the reference. Default: 0.1.
        label_smoothing: share of the labels taken as swapped. Default: 0.
        loss_type: one of `dpo_loss`'s. "ipo" and "sigmoid_norm" take means over an answer's tokens. Default:
            `"sigmoid"`.
        reduction: `"none"`, `"mean"` or `"sum"`.
        linear_bias: `(C)`. Default: none.
        ignore_index: the label of tokens that do not count. Default: -100.
        temperature: divides the logits. Default: 1.
        softcap: bounds the logits (Gemma 2). Default: none.

    Returns:
        A scalar, or for `"none"` a tensor `[B]`; float32 for half types.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: for arguments of a wrong kind, naming it.

    Source: Rafailov et al., https://arxiv.org/abs/2305.18290; from hidden states as in Liger,
    https://arxiv.org/abs/2410.10989.
    """
    (chosen, chosen_count), (rejected, rejected_count) = _sequence_log_probs(
        {"chosen_input": chosen_input, "rejected_input": rejected_input},
        {"chosen_labels": chosen_labels, "rejected_labels": rejected_labels},
        linear_weight, linear_bias, ignore_index, temperature, softcap,
    )  # fmt: skip
    lengths = {}
    if loss_type in ("ipo", "sigmoid_norm"):
        lengths = {
            "chosen_lengths": chosen_count.clamp(min=1),
            "rejected_lengths": rejected_count.clamp(min=1),
        }
    return dpo_loss(
        chosen, rejected, reference_chosen_logps, reference_rejected_logps, beta, label_smoothing, loss_type,
        reduction, **lengths,
    )  # fmt: skip


def _labels(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    pairs, tokens, _, classes = shape
    labels = draw.index(classes, pairs, tokens)
    return torch.where(draw.index(4, pairs, tokens) == 0, -100, labels)


def _inputs(draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    pairs, tokens, features, classes = shape
    return {
        "chosen_input": draw.normal(pairs, tokens, features),
        "rejected_input": draw.normal(pairs, tokens, features),
        "linear_weight": draw.normal(classes, features, scale=features**-0.5),
        "chosen_labels": draw.index(classes, pairs, tokens),
        "rejected_labels": draw.index(classes, pairs, tokens),
        "reference_chosen_logps": draw.uniform(pairs, low=-2.0 * tokens, high=0.0),
        "reference_rejected_logps": draw.uniform(pairs, low=-2.0 * tokens, high=0.0),
    }


register(
    Loss(
        name="linear_dpo_loss",
        family="linear",
        function=linear_dpo_loss,
        reference=reference.linear_dpo_loss,
        products=(2, 6),
        inputs=_inputs,
        wrt=("chosen_input", "rejected_input", "linear_weight", "linear_bias"),
        forward_arguments=(
            "chosen_input", "rejected_input", "linear_weight", "chosen_labels", "rejected_labels",
            "reference_chosen_logps", "reference_rejected_logps", "linear_bias",
        ),
        cases={
            "plain": {},
            "ipo+bias": {
                "loss_type": "ipo",
                "linear_bias": lambda d, s: d.normal(s[3]),
                "chosen_labels": _labels,
                "reduction": "none",
            },
            "everything": {
                "loss_type": "robust",
                "label_smoothing": 0.1,
                "rejected_labels": _labels,
                "temperature": 0.7,
                "softcap": 5.0,
                "reduction": "sum",
            },
        },
        shapes=((3, 4, 8, 33), (2, 3, 5, 130), (1, 2, 3, 2)),
        bench_shape=(4, 256, 1024, 32000),
        traffic=lambda shape, itemsize, backward: (
            (2 if backward else 1) * (2 * shape[0] * shape[1] + shape[3]) * shape[2] * itemsize
        ),
    )
)  # fmt: skip
