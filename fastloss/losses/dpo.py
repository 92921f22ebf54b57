"""Direct preference optimisation and its relatives, from log-probabilities of completions and from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES
from fastloss._ops.checks import (
    as_weight,
    check_integer,
    check_number,
    check_real,
    check_reduction,
    check_tensor,
    check_tensors,
    choice,
    positive_beta,
    positive_number,
    same_shape,
    smoothing_in,
)
from fastloss._ops.dtypes import accumulation_dtype, autocast_to_fp32
from fastloss._ops.elementwise import ElementOp, call_elementwise, zeros_like
from fastloss.losses.token_statistics import label_log_probs, linear_sequence_log_probs, token_stats

__all__ = ["dpo_loss", "dpo_loss_from_logits", "linear_dpo_loss"]


_dpo = ElementOp("dpo_loss", reference.dpo.dpo_element)

_SORTED = ("aot", "aot_unpaired")
_SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", *_SORTED)
OF_LENGTHS = ("ipo", "sigmoid_norm", "sft")
"""The types of `dpo_loss` that take lengths."""
LOSS_TYPES = (*_dpo.hparams.choices["type"], "sigmoid_norm", *_SORTED)


def _types(loss_type, loss_weights) -> list[tuple[str, float]]:
    """Return the types and their weights."""
    if isinstance(loss_type, str):
        if loss_weights is not None:
            raise ValueError("loss_weights: only where loss_type is a sequence")
        return [(choice("loss_type", loss_type, LOSS_TYPES), 1.0)]
    kinds = [choice("loss_type", kind, LOSS_TYPES) for kind in loss_type]
    weights = [1.0] * len(kinds) if loss_weights is None else list(loss_weights)
    if not kinds or len(weights) != len(kinds):
        raise ValueError(
            f"loss_weights: expected one for each of the types {kinds}, at least one, got {weights}"
        )
    return [(k, check_number("loss_weights", w)) for k, w in zip(kinds, weights, strict=True)]


def _check_types(kinds: list[str], smoothing: float, divergence: str, lengths: bool, weight: bool) -> None:
    if smoothing and not any(k in _SMOOTHED for k in kinds):
        raise ValueError(f"label_smoothing is not supported for loss_type={', '.join(map(repr, kinds))}")
    if lengths and not any(k in OF_LENGTHS for k in kinds):
        raise ValueError(f"chosen_lengths: {', '.join(kinds)} takes no lengths")
    for kind in kinds:
        if kind == "exo_pair" and not 0 < smoothing < 1:
            raise ValueError("label_smoothing: exo_pair needs a number between 0 and 1")
        if kind == "robust" and smoothing >= 0.5:
            raise ValueError(f"label_smoothing: robust needs a number below 1/2, got {smoothing}")
        if kind == "sigmoid_norm" and not lengths:
            raise ValueError("chosen_lengths: sigmoid_norm needs the lengths of the completions")
        if divergence != "reverse_kl" and (kind in ("sft", *_SORTED) or (lengths and kind in OF_LENGTHS)):
            raise ValueError(f"f_divergence: not with lengths nor with {kind}")
        if weight and kind in _SORTED:
            raise ValueError(f"weight: not with {kind}, which takes pairs apart")


def _counts(name: str, lengths: Tensor | None, like: Tensor, weight: Tensor | None) -> Tensor | None:
    """Return the lengths, at least 0, in the accumulation type or a wider one of theirs; 0 of pairs of weight 0."""
    if lengths is None:
        return None
    check_tensors(like, **{name: lengths})
    check_real(**{name: lengths})
    if lengths.shape != like.shape:
        raise RuntimeError(
            f"{name}: expected the shape of the log-probabilities, {tuple(like.shape)}, got {tuple(lengths.shape)}"
        )
    n = lengths.to(torch.promote_types(accumulation_dtype(like.dtype), lengths.dtype)).clamp(min=0)
    return n if weight is None else torch.where(weight != 0, n, 0.0)


def _of_lengths(kind: str, inputs: list[Tensor], chosen: Tensor, rejected: Tensor | None) -> list[Tensor]:
    """Divide by the completions' lengths; for sft by their mean: a mean over pairs is then that of all tokens."""
    if kind == "sft":
        return [inputs[0] / (chosen.sum().clamp(min=1) / max(chosen.numel(), 1)), *inputs[1:]]
    means = [x / n.clamp(min=1) for x, n in zip(inputs, (chosen, rejected, chosen, rejected), strict=True)]
    dtype = torch.promote_types(chosen.dtype, rejected.dtype)
    return [x.to(dtype) for x in means]


def _sorted_pairs(kind: str, pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> list[Tensor]:
    if pc.dim() == 0:
        raise ValueError("policy_chosen_logps: expected at least one dimension to sort along")
    zero = zeros_like(pc)
    pairs = (pc - pr, rc - rr) if kind == "aot" else (pc - rc, pr - rr)
    first, second = (x.sort(dim=0, stable=True)[0] for x in pairs)
    return [first, zero, second, zero] if kind == "aot" else [first, second, zero, zero]


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    reduction: str = "mean",
    *,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    exponent_clamp: float | None = None,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    loss_weights: Sequence[float] | None = None,
    weight: Tensor | None = None,
    return_rewards: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Compute the DPO loss or a variant (Direct Preference Optimization) from log-probabilities of whole completions.

    With the log-ratios :math:`c` and :math:`r` of the chosen and the rejected completion (policy minus reference),
    :math:`u = \beta (c - r)`, :math:`\ell = -\log \sigma` and label smoothing :math:`\varepsilon`, the loss of a
    pair is

    ================  ==============================================================================================
    sigmoid           :math:`(1 - \varepsilon)\, \ell(u) + \varepsilon\, \ell(-u)` (DPO; with smoothing cDPO)
    sigmoid_norm      the same with :math:`c` and :math:`r` divided by the completions' lengths
    hinge             :math:`\max(0, 1 - u)` (SLiC)
    ipo               :math:`(c - r - 1 / (2 \beta))^2`, of means if lengths are given
    exo_pair          :math:`\sigma(u) [\log \sigma(u) - \log(1 - \varepsilon)]
                      + \sigma(-u) [\log \sigma(-u) - \log \varepsilon]`, :math:`\varepsilon > 0`
    nca_pair          :math:`\ell(\beta c) + \ell(-\beta c) / 2 + \ell(-\beta r) / 2`
    robust            :math:`[(1 - \varepsilon)\, \ell(u) - \varepsilon\, \ell(-u)] / (1 - 2 \varepsilon)`
    bco_pair          :math:`\ell(\beta c) + \ell(-\beta r)`
    sppo_hard         :math:`(c - 1 / (2 \beta))^2 + (r + 1 / (2 \beta))^2`
    apo_zero          :math:`\sigma(-\beta c) + \sigma(\beta r)`
    apo_down          :math:`\sigma(\beta c) + \sigma(-u)`
    discopop          :math:`\ell(u)\, \sigma(-u / \tau) + e^{-u} \sigma(u / \tau)`
    sft               minus the policy's log-probability of the chosen completion; if lengths are given divided by
                      their mean over the pairs
    aot               sigmoid of sorted :math:`\log` ratios chosen / rejected of the policy and of the reference
    aot_unpaired      sigmoid of sorted :math:`c` and sorted :math:`r`
    ================  ==============================================================================================

    Where a divergence other than the reverse KL is wanted, :math:`c` and :math:`r` first go through
    :math:`1 - e^{-x}` (forward_kl), :math:`\log 2 + \log \sigma(x)` (js) or
    :math:`(e^{(a - 1) x} - 1) / (a - 1)` (alpha).
    Value and gradients are one kernel each way; they keep their relative precision for all finite arguments.
    Several types at once are added up with their weights (mixed preference optimisation), one kernel each.
    With lengths the mean of sft over pairs is the mean over the tokens of all chosen completions, as in TRL; `"none"`
    gives the pairs' shares of it, `"sum"` as many times that mean as there are pairs.

    Args:
        policy_chosen_logps, policy_rejected_logps: log-probabilities of the completions, summed over their tokens, of
            one shape, mostly `(N)`; float32, float64, bfloat16 or float16.
        reference_chosen_logps, reference_rejected_logps: those of the reference model, of the same shape.
        beta: :math:`\beta > 0`. Default: 0.1.
        label_smoothing: :math:`\varepsilon` in [0, 1] (below 1/2 for robust, above 0 for exo_pair); types
            without it in their formula refuse it; of several types it is for those that have it. Default: 0.
        loss_type: one of the table, or a sequence of them. Default: `"sigmoid"`.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.
        f_divergence: `"reverse_kl"`, `"forward_kl"`, `"js"` or `"alpha"`. Default: `"reverse_kl"`.
        f_alpha: :math:`a` of the alpha divergence. Default: 0.5.
        exponent_clamp: bounds the exponent of forward_kl and alpha from above. Default: none.
        discopop_tau: :math:`\tau > 0`. Default: 0.05.
        chosen_lengths, rejected_lengths: numbers of tokens, of the shape of the log-probabilities; for
            sigmoid_norm (required), ipo and sft. No sum is divided by less than 1. Default: none.
        loss_weights: of each type of a sequence. Default: 1 each.
        weight: of each pair, of their shape, without gradient, for example of weighted preference optimisation; pairs
            of weight 0 are ignored, their lengths too, even if NaN; not with the sorted types. The mean is over the
            pairs, whatever their weights. Default: 1.
        return_rewards: also give :math:`\beta` times the log-ratios, detached. Default: False.

    Returns:
        The loss, a scalar or for `"none"` of the shape of the inputs; with `return_rewards` a tuple of it and the
        rewards of the chosen and of the rejected completions.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/2305.18290; types as `DPOConfig.loss_type` of TRL, where each one's paper stands;
    `weight` https://arxiv.org/abs/2406.11827, several types https://arxiv.org/abs/2411.10442.
    """
    types = _types(loss_type, loss_weights)
    kinds = [kind for kind, _ in types]
    choice("f_divergence", f_divergence, _dpo.hparams.choices["divergence"])
    mode = check_reduction(reduction)
    smoothing, beta = smoothing_in(label_smoothing), positive_beta(beta)
    tau = positive_number("discopop_tau", discopop_tau)
    lengths = chosen_lengths is not None or rejected_lengths is not None
    if lengths and (chosen_lengths is None or (rejected_lengths is None and kinds != ["sft"])):
        raise ValueError("chosen_lengths, rejected_lengths: expected both")
    _check_types(kinds, smoothing, f_divergence, lengths, weight is not None)
    top = math.inf if exponent_clamp is None else check_number("exponent_clamp", exponent_clamp)
    check_tensor("policy_chosen_logps", policy_chosen_logps)
    pc, pr, rc, rr, w = same_shape(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps, reference_rejected_logps=reference_rejected_logps,
        weight=as_weight("weight", weight, policy_chosen_logps.dtype),
    )  # fmt: skip
    w = None if w is None else w.detach()
    rewards = ((beta * (pc - rc)).detach(), (beta * (pr - rr)).detach()) if return_rewards else ()
    dtype = pc.dtype
    if len(kinds) > 1 or kinds[0] in _SORTED or lengths:  # what is done outside the kernel is rounded once
        pc, pr, rc, rr = (x.float() if dtype in HALF_TYPES else x for x in (pc, pr, rc, rr))
    sums = [pc, pr, rc, rr]
    chosen_count = _counts("chosen_lengths", chosen_lengths, pc, w)
    rejected_count = _counts("rejected_lengths", rejected_lengths, pc, w)
    if any(k in OF_LENGTHS for k in kinds):
        for n in (chosen_lengths, rejected_lengths):
            dtype = dtype if n is None else torch.promote_types(dtype, n.dtype)
    divergence = "reverse_kl" if f_divergence == "alpha" and f_alpha == 1 else f_divergence
    loss = None
    for kind, loss_weight in types:
        inputs = sums
        if kind in _SORTED:
            inputs = _sorted_pairs(kind, *sums)
        elif chosen_count is not None and kind in OF_LENGTHS:
            inputs = _of_lengths(kind, sums, chosen_count, rejected_count)
        formula = "sigmoid" if kind in ("sigmoid_norm", *_SORTED) else kind
        hparams = _dpo.pack(
            type=formula, beta=beta, label_smoothing=smoothing, divergence=divergence,
            alpha=check_number("f_alpha", f_alpha), tau=tau, top=top,
        )  # fmt: skip
        one = call_elementwise(_dpo, inputs, hparams, mode, w)
        one = one if loss_weight == 1 else loss_weight * one
        loss = one if loss is None else loss + one
    if dtype in HALF_TYPES and loss.dtype != dtype and not autocast_to_fp32(policy_chosen_logps):
        loss = loss.to(dtype)
    return (loss, *rewards) if return_rewards else loss


def dpo_loss_from_logits(
    policy_logits: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    exponent_clamp: float | None = None,
    discopop_tau: float = 0.05,
    loss_weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    return_rewards: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Compute `dpo_loss` from the logits of both completions, which are read once in each pass.

    The batch is concatenated chosen first, as TRL does: sequence `i` of the first half is the chosen, sequence `i`
    of the second half the rejected completion of pair `i`. The log-probability of a completion is
    :math:`\sum_t \log p_t(y_t)` over its labels that are not ignored; labels are aligned with the logits,
    `labels[:, t]` is what `policy_logits[:, t]` predicts. ipo, sigmoid_norm and sft take the numbers of these tokens as
    lengths. Nothing of the logits' size is stored but their gradient.

    Args:
        policy_logits: shape `(2B, T, V)`, chosen completions first; float32, float64, bfloat16 or float16.
        labels: int64 `(2B, T)`.
        reference_chosen_logps, reference_rejected_logps: log-probabilities of the completions by the reference model,
            summed over the same tokens, shape `(B)`, as `sequence_log_probs` gives them.
        beta, label_smoothing, loss_type, loss_weights: as for `dpo_loss`.
        ignore_index: the label of tokens that do not count. Default: -100.
        reduction: `"none"`, `"mean"` or `"sum"` over pairs. Default: `"mean"`.
        f_divergence, f_alpha, exponent_clamp, discopop_tau: as for `dpo_loss`.
        temperature: divides the logits. Default: 1.
        ld_alpha: in [0, 1], LD-DPO: of the longer completion, the policy's tokens behind as many as the shorter one has
            count so much. Default: none, 1.
        use_weighting: WPO: each pair is weighted by the policy's own probability of it,
            :math:`\min(1, e^{a_c + a_r})` with :math:`a` the mean of :math:`\log p_t(y_t) - \log \sum_j p_{tj}^2`
            over the tokens of a completion; without gradient. Default: False.
        return_rewards: also give :math:`\beta` times the log-ratios, detached. Default: False.

    Returns:
        The loss, float32 for half-precision dtypes, a scalar or for `"none"` of shape `(B)`; with `return_rewards` a
        tuple of it and the rewards of the chosen and of the rejected completions.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.
        IndexError: on the CPU for a label out of bounds.

    Source: https://arxiv.org/abs/2305.18290, `DPOTrainer` of TRL; `ld_alpha` https://arxiv.org/abs/2409.06411,
    `use_weighting` https://arxiv.org/abs/2406.11827.
    """
    _check_logits(policy_logits, labels)
    if ld_alpha is not None:
        ld_alpha = check_number("ld_alpha", ld_alpha, 0.0, 1.0)
    kinds = [kind for kind, _ in _types(loss_type, loss_weights)]
    ignore_index = check_integer("ignore_index", ignore_index)
    valid = labels != ignore_index
    peak = None
    if use_weighting:
        try:
            stats = token_stats(policy_logits, torch.where(valid, labels, 0), temperature, mask=valid)
        except IndexError as error:
            raise IndexError(f"labels: {error}") from None
        token_logps, peak = stats.logp, stats.log_sum_p2.detach()
    else:
        token_logps = label_log_probs(policy_logits, labels, ignore_index, temperature, "labels")
    count = valid.sum(-1)
    counted = token_logps
    if ld_alpha is not None:
        tail = ld_alpha * token_logps if ld_alpha else 0.0
        counted = torch.where(_in_shared_prefix(valid), token_logps, tail)
    chosen, rejected = _halves(counted.sum(-1))
    weight = None
    if peak is not None:
        adjusted = torch.where(valid, token_logps.detach() - peak, 0.0).sum(-1) / count.clamp(min=1)
        of_chosen, of_rejected = _halves(adjusted)
        weight = (of_chosen + of_rejected).exp().clamp(max=1.0)
    chosen_lengths, rejected_lengths = _halves(count) if any(k in OF_LENGTHS for k in kinds) else (None, None)
    return dpo_loss(
        chosen, rejected, reference_chosen_logps, reference_rejected_logps, beta, label_smoothing, loss_type,
        reduction, f_divergence=f_divergence, f_alpha=f_alpha, exponent_clamp=exponent_clamp,
        discopop_tau=discopop_tau, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
        loss_weights=loss_weights, weight=weight, return_rewards=return_rewards,
    )  # fmt: skip


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of the chosen and those of the rejected completions."""
    pairs = x.shape[0] // 2
    return x[:pairs], x[pairs:]


def _in_shared_prefix(valid: Tensor) -> Tensor:
    """Return for tokens [2B, T], chosen first, whether they are among as many as the shorter completion has."""
    place = valid.cumsum(-1)  # from 1 at the first token
    length = place[:, -1:]
    chosen, rejected = _halves(length)
    shorter = torch.minimum(chosen, rejected).repeat(2, 1)
    return place <= shorter


def _check_logits(policy_logits: Tensor, labels: Tensor) -> None:
    for name, t in (("policy_logits", policy_logits), ("labels", labels)):
        check_tensor(name, t)
    if not policy_logits.is_floating_point():
        raise NotImplementedError(f"policy_logits: expected a floating point type, got {policy_logits.dtype}")
    if policy_logits.dim() != 3 or policy_logits.shape[0] % 2:
        raise RuntimeError(
            f"policy_logits: expected (2B, T, V), chosen completions first, got {tuple(policy_logits.shape)}"
        )
    if labels.shape != policy_logits.shape[:-1]:
        raise RuntimeError(
            f"labels: expected shape {tuple(policy_logits.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise RuntimeError(f"labels: expected classes of type int64, got {labels.dtype}")
    if labels.device != policy_logits.device:
        raise RuntimeError(
            f"labels: expected the device of policy_logits, {policy_logits.device}, got {labels.device}"
        )


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
    max_extra_bytes: int | None = None,
) -> Tensor:
    r"""Compute the DPO loss from hidden states, with the logits in chunks.

    `dpo_loss` of the log-probabilities of whole completions, :math:`\sum_t \log \mathrm{softmax}(W h_t + b)_{y_t}` over
    the labels that are not ignored. Logits are made for a chunk of tokens, forward and again backward, chosen and
    rejected completions in one pass; beyond the gradients that takes what `linear_token_stats` takes. Labels are
    aligned: `chosen_labels[:, t]` is what `chosen_input[:, t]` predicts.

    Args:
        chosen_input: hidden states of the chosen completions, of shape `[B, T, in_features]`.
        rejected_input: those of the rejected ones, `[B, T', in_features]`, of the same type.
        linear_weight: `(C, in_features)`, of the input's type.
        chosen_labels: int64, `[B, T]`.
        rejected_labels: int64, `[B, T']`.
        reference_chosen_logps: `[B]`, the reference model's, for example from `linear_token_stats`; as a constant
            or with a gradient of its own.
        reference_rejected_logps: `[B]`.
        beta: strength of the reference. Default: 0.1.
        label_smoothing: fraction of the labels taken as swapped. Default: 0.
        loss_type: one of `dpo_loss`'s. "ipo", "sigmoid_norm" and "sft" take the numbers of these tokens as lengths.
            Default: `"sigmoid"`.
        reduction: `"none"`, `"mean"` or `"sum"`.
        linear_bias: `(C)`. Default: none.
        ignore_index: the label of tokens that do not count. Default: -100.
        temperature: divides the logits. Default: 1.
        softcap: bounds the logits (Gemma 2). Default: none.
        max_extra_bytes: as for `linear_token_stats`.

    Returns:
        A scalar, or for `"none"` a tensor `[B]`; float32 for half-precision dtypes.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: for arguments of a wrong kind, naming it.

    Source: Rafailov et al., https://arxiv.org/abs/2305.18290; from hidden states as in Liger,
    https://arxiv.org/abs/2410.10989.
    """
    (chosen, chosen_count), (rejected, rejected_count) = linear_sequence_log_probs(
        {"chosen_input": chosen_input, "rejected_input": rejected_input},
        {"chosen_labels": chosen_labels, "rejected_labels": rejected_labels},
        linear_weight, linear_bias, ignore_index, temperature, softcap, max_extra_bytes,
    )  # fmt: skip
    lengths: dict[str, Any] = {}
    if any(kind in OF_LENGTHS for kind, _ in _types(loss_type, None)):
        lengths = {"chosen_lengths": chosen_count, "rejected_lengths": rejected_count}
    return dpo_loss(  # type: ignore[return-value]  # without rewards it is a tensor
        chosen, rejected, reference_chosen_logps, reference_rejected_logps, beta, label_smoothing, loss_type,
        reduction, **lengths,
    )  # fmt: skip
