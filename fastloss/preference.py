"""Preference and reward heads: of log-probabilities of whole answers, or of rewards, each in one kernel."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from fastloss import reference
from fastloss._checks import check_floating, check_number, check_reduction, check_tensors
from fastloss._registry import Draw, Loss, register
from fastloss.pointwise import element_op, is_wide
from fastloss.reference.preference import DIVERGENCES, DPO_TYPES

__all__ = [
    "alpha_po_loss",
    "bradley_terry_loss",
    "cpo_loss",
    "dpo_loss",
    "kto_loss",
    "orpo_loss",
    "simpo_loss",
]

_formulas = reference.preference
_dpo = element_op("dpo_loss", _formulas.dpo_element, inputs=4, wrt=(0, 1, 2, 3))
_kto = element_op("kto_loss", _formulas.kto_element, inputs=4, wrt=(0, 1))
_reference_free = element_op("reference_free", _formulas.reference_free_element, inputs=3, wrt=(0, 1, 2))
_orpo = element_op("orpo_loss", _formulas.orpo_element, inputs=3, wrt=(0, 1, 2))
_bradley_terry = element_op("bradley_terry_loss", _formulas.bradley_terry_element, inputs=3, wrt=(0, 1, 2))


def same_shape(**tensors: Tensor | None) -> list[Tensor | None]:
    """Checks that all are floating-point tensors of the first one's shape and device; gives them one type."""
    (name, first), *_ = tensors.items()
    if not isinstance(first, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(first).__name__}")
    present = {k: t for k, t in tensors.items() if t is not None}
    for k, t in present.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{k}: expected a Tensor, got {type(t).__name__}")
        check_floating(k, t)
        if t.device != first.device:
            raise RuntimeError(f"{k}: expected the device of {name}, {first.device}, got {t.device}")
        if t.shape != first.shape:
            raise RuntimeError(
                f"{k}: expected the shape of {name}, {tuple(first.shape)}, got {tuple(t.shape)}"
            )
    dtype = reduce(torch.promote_types, (t.dtype for t in present.values()))
    return [None if t is None else t.to(dtype) for t in tensors.values()]


def zeros_like(x: Tensor) -> Tensor:
    """One zero that every element reads."""
    return x.new_zeros(()).expand(x.shape)


def _head(op, inputs, numbers, mode, weight=None) -> Tensor:
    return op((*inputs, weight, None), (mode, numbers, -100, 0, is_wide(inputs[0])))


def _smoothing(value: float, high: float = 1.0) -> float:
    return check_number("label_smoothing", value, 0.0, high)


def _beta(value: float) -> float:
    if check_number("beta", value) <= 0:
        raise ValueError(f"beta: expected a positive number, got {value}")
    return float(value)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


_SORTED = ("aot", "aot_unpaired")
_SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", *_SORTED)
_DPO_NAMES = (*DPO_TYPES, "sigmoid_norm", *_SORTED)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
    *,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    exponent_clamp: float | None = None,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    return_rewards: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Direct preference optimisation and its relatives, from log-probabilities of whole answers.

    With the log-ratios :math:`c` and :math:`r` of the chosen and the rejected answer (policy minus reference),
    :math:`u = \beta (c - r)`, :math:`\ell = -\log \sigma` and label smoothing :math:`\varepsilon`, the loss of a
    pair is

    ================  ==============================================================================================
    sigmoid           :math:`(1 - \varepsilon)\, \ell(u) + \varepsilon\, \ell(-u)` (DPO; with smoothing cDPO)
    sigmoid_norm      the same with :math:`c` and :math:`r` divided by the answers' lengths
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
    sft               minus the policy's log-probability of the chosen answer, its mean if lengths are given
    aot               sigmoid of sorted :math:`\log` ratios chosen / rejected of the policy and of the reference
    aot_unpaired      sigmoid of sorted :math:`c` and sorted :math:`r`
    ================  ==============================================================================================

    Where a divergence other than the reverse KL is wanted, :math:`c` and :math:`r` first go through
    :math:`1 - e^{-x}` (forward_kl), :math:`\log 2 + \log \sigma(x)` (js) or
    :math:`(e^{(a - 1) x} - 1) / (a - 1)` (alpha).
    Value and gradients are one kernel each way; they keep their relative precision for all finite arguments.

    Args:
        policy_chosen_logps, policy_rejected_logps: log-probabilities of the answers, summed over their tokens, of
            one shape, mostly `(N)`; float32, float64, bfloat16 or float16.
        reference_chosen_logps, reference_rejected_logps: those of the reference model, of the same shape.
        beta: :math:`\beta > 0`. Default: 0.1.
        label_smoothing: :math:`\varepsilon` in [0, 1] (below 1/2 for robust, above 0 for exo_pair); types
            without it in their formula refuse it. Default: 0.
        loss_type: one of the table. Default: `"sigmoid"`.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.
        f_divergence: `"reverse_kl"`, `"forward_kl"`, `"js"` or `"alpha"`. Default: `"reverse_kl"`.
        f_alpha: :math:`a` of the alpha divergence. Default: 0.5.
        exponent_clamp: bounds the exponent of forward_kl and alpha from above. Default: none.
        discopop_tau: :math:`\tau > 0`. Default: 0.05.
        chosen_lengths, rejected_lengths: numbers of tokens, of the shape of the log-probabilities; for
            sigmoid_norm (required), ipo and sft. Default: none.
        return_rewards: also give :math:`\beta` times the log-ratios, detached. Default: False.

    Returns:
        The loss, a scalar or for `"none"` of the shape of the inputs; with `return_rewards` a tuple of it and the
        rewards of the chosen and of the rejected answers.

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/2305.18290; types as `DPOConfig.loss_type` of TRL, where each one's paper stands.
    """
    _choice("loss_type", loss_type, _DPO_NAMES)
    _choice("f_divergence", f_divergence, DIVERGENCES)
    mode = check_reduction(reduction)
    smoothing, beta = _smoothing(label_smoothing), _beta(beta)
    if smoothing and loss_type not in _SMOOTHED:
        raise ValueError(f"label_smoothing: {loss_type} has none")
    if loss_type == "exo_pair" and not 0 < smoothing < 1:
        raise ValueError("label_smoothing: exo_pair needs a number between 0 and 1")
    if loss_type == "robust" and smoothing >= 0.5:
        raise ValueError(f"label_smoothing: robust needs a number below 1/2, got {smoothing}")
    if check_number("discopop_tau", discopop_tau) <= 0:
        raise ValueError(f"discopop_tau: expected a positive number, got {discopop_tau}")
    lengths = chosen_lengths is not None or rejected_lengths is not None
    if lengths and (chosen_lengths is None or (rejected_lengths is None and loss_type != "sft")):
        raise ValueError("chosen_lengths, rejected_lengths: expected both")
    if lengths and loss_type not in ("ipo", "sigmoid_norm", "sft"):
        raise ValueError(f"chosen_lengths: {loss_type} takes no lengths")
    if loss_type == "sigmoid_norm" and not lengths:
        raise ValueError("chosen_lengths: sigmoid_norm needs the lengths of the answers")
    if f_divergence != "reverse_kl" and (lengths or loss_type in ("sft", *_SORTED)):
        raise ValueError(f"f_divergence: not with lengths nor with {loss_type}")
    top = math.inf if exponent_clamp is None else check_number("exponent_clamp", exponent_clamp)
    pc, pr, rc, rr = same_shape(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps, reference_rejected_logps=reference_rejected_logps,
    )  # fmt: skip
    rewards = ((beta * (pc - rc)).detach(), (beta * (pr - rr)).detach()) if return_rewards else ()
    if lengths:
        (pc, rc), (pr, rr) = (
            _means("chosen_lengths", chosen_lengths, pc, rc),
            ((pr, rr) if rejected_lengths is None else _means("rejected_lengths", rejected_lengths, pr, rr)),
        )
        dtype = torch.promote_types(pc.dtype, pr.dtype)
        pc, pr, rc, rr = (x.to(dtype) for x in (pc, pr, rc, rr))
    if loss_type in _SORTED:
        if pc.dim() == 0:
            raise ValueError("policy_chosen_logps: expected at least one dimension to sort along")
        zero = zeros_like(pc)
        pairs = (pc - pr, rc - rr) if loss_type == "aot" else (pc - rc, pr - rr)
        first, second = (x.sort(0)[0] for x in pairs)
        pc, pr, rc, rr = (first, zero, second, zero) if loss_type == "aot" else (first, second, zero, zero)
    kind = "sigmoid" if loss_type in ("sigmoid_norm", *_SORTED) else loss_type
    divergence = "reverse_kl" if f_divergence == "alpha" and f_alpha == 1 else f_divergence
    numbers = [
        float(DPO_TYPES.index(kind)), beta, smoothing, float(DIVERGENCES.index(divergence)),
        check_number("f_alpha", f_alpha), float(discopop_tau), top,
    ]  # fmt: skip
    loss = _head(_dpo, (pc, pr, rc, rr), numbers, mode)
    return (loss, *rewards) if return_rewards else loss


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    kl: Tensor | None = None,
    beta: float = 0.1,
    reduction: str = "mean",
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
) -> Tensor:
    r"""Kahneman-Tversky optimisation, of answers that are desirable or not, without pairs.

    With the log-ratio :math:`x` of policy and reference and the reference point :math:`z`, the loss of an answer is

    .. math:: \lambda_D\, \sigma(-\beta (x - z)) \text{ if it is desirable, else }
              \lambda_U\, \sigma(\beta (x - z)) .

    Args:
        policy_logps, reference_logps: log-probabilities of the answers, of one shape, mostly `(N)`; float32,
            float64, bfloat16 or float16.
        labels: True (or positive) where the answer is desirable, of the same shape.
        kl: :math:`z`, one number or one for each answer, without gradient: an estimate of the divergence of policy
            from reference, in the paper `(policy - reference).mean().clamp(min=0)` of answers to other prompts,
            averaged over all processes before the clamp. Default: 0.
        beta: :math:`\beta > 0`. Default: 0.1.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.
        desirable_weight, undesirable_weight: :math:`\lambda_D` and :math:`\lambda_U`. Default: 1.
        loss_type: `"kto"`, or `"apo_zero_unpaired"`, which takes no `kl` (:math:`z = 0`). Default: `"kto"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/2402.01306, https://arxiv.org/abs/2408.06266; `KTOTrainer` of TRL.
    """
    _choice("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    mode = check_reduction(reduction)
    numbers = [
        _beta(beta), check_number("desirable_weight", desirable_weight),
        check_number("undesirable_weight", undesirable_weight),
    ]  # fmt: skip
    lp, ref = same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    check_tensors(lp, labels=labels, kl=kl)
    if labels.is_complex():
        raise NotImplementedError("labels: expected flags or real numbers")
    if labels.shape != lp.shape:
        raise RuntimeError(
            f"labels: expected the shape of policy_logps, {tuple(lp.shape)}, got {tuple(labels.shape)}"
        )
    if kl is not None and loss_type == "apo_zero_unpaired":
        raise ValueError("kl: apo_zero_unpaired has none")
    point = zeros_like(lp)
    if kl is not None:
        check_floating("kl", kl)
        if kl.numel() != 1 and kl.shape != lp.shape:
            raise RuntimeError(f"kl: expected one number or the shape of policy_logps, got {tuple(kl.shape)}")
        dtype = torch.promote_types(lp.dtype, kl.dtype) if kl.dim() or not lp.dim() else lp.dtype
        lp, ref, point = lp.to(dtype), ref.to(dtype), kl.detach().to(dtype)
        point = point if point.shape == lp.shape else point.reshape(()).expand(lp.shape)
    return _head(_kto, (lp, ref, (labels > 0).to(lp.dtype), point), numbers, mode)


def _means(name: str, lengths: Tensor, *sums: Tensor) -> list[Tensor]:
    check_tensors(sums[0], **{name: lengths})
    if lengths.is_complex():
        raise NotImplementedError(f"{name}: expected real numbers, got {lengths.dtype}")
    if lengths.shape != sums[0].shape:
        raise RuntimeError(
            f"{name}: expected the shape of the log-probabilities, {tuple(sums[0].shape)}, got {tuple(lengths.shape)}"
        )
    return [x / lengths for x in sums]


_FREE_TYPES = ("sigmoid", "hinge", "ipo")


def _free(chosen, rejected, nll, loss_type, beta, margin, smoothing, nll_weight, alpha, reduction) -> Tensor:
    mode = check_reduction(reduction)
    if _smoothing(smoothing) and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing: {loss_type} has none")
    c, r, n = same_shape(chosen_logps=chosen, rejected_logps=rejected, chosen_nll=nll)
    numbers = [
        float(DPO_TYPES.index(loss_type)), _beta(beta), check_number("gamma", margin), float(smoothing),
        0.0 if n is None else check_number("alpha", nll_weight), check_number("alpha", alpha),
    ]  # fmt: skip
    return _head(_reference_free, (c, r, zeros_like(c) if n is None else n), numbers, mode)


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
) -> Tensor:
    r"""SimPO: preference optimisation with mean log-probabilities, a margin and no reference model.

    With :math:`u = \beta (c - r) - \gamma` the loss of a pair is :math:`-(1 - \varepsilon) \log \sigma(u)
    - \varepsilon \log \sigma(-u)`, or :math:`\max(0, 1 - u)` for `"hinge"`.

    Args:
        chosen_logps, rejected_logps: :math:`c` and :math:`r`, mean log-probabilities of the tokens of an answer, of
            one shape, mostly `(N)`; float32, float64, bfloat16 or float16.
        beta: :math:`\beta > 0`. Default: 2.
        gamma: the margin :math:`\gamma`, in units of :math:`u`. Default: 0.5.
        label_smoothing: :math:`\varepsilon` in [0, 1], for `"sigmoid"`. Default: 0.
        loss_type: `"sigmoid"` or `"hinge"`. Default: `"sigmoid"`.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/2405.14734; `CPOConfig(loss_type="simpo")` of TRL.
    """
    _choice("loss_type", loss_type, ("sigmoid", "hinge"))
    return _free(
        chosen_logps, rejected_logps, None, loss_type, beta, gamma, label_smoothing, 0.0, 0.0, reduction
    )


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
) -> Tensor:
    r"""Contrastive preference optimisation: DPO with a uniform reference, and the likelihood of the chosen answer.

    The loss of a pair is :math:`-(1 - \varepsilon) \log \sigma(u) - \varepsilon \log \sigma(-u)
    + \alpha\, \mathrm{nll}` with :math:`u = \beta (c - r)`; for `"hinge"` :math:`\max(0, 1 - u)`, for `"ipo"`
    :math:`(c - r - 1 / (2 \beta))^2` in the place of the logarithms.

    Args:
        chosen_logps, rejected_logps: :math:`c` and :math:`r`, log-probabilities of the answers (for `"ipo"` their
            means), of one shape, mostly `(N)`; float32, float64, bfloat16 or float16.
        chosen_nll: negative log-likelihood of the chosen answers, same shape. Default: none, no such term.
        beta: :math:`\beta > 0`. Default: 0.1.
        alpha: :math:`\alpha`, the weight of `chosen_nll`. Default: 1.
        label_smoothing: :math:`\varepsilon` in [0, 1], for `"sigmoid"`. Default: 0.
        loss_type: `"sigmoid"`, `"hinge"` or `"ipo"`. Default: `"sigmoid"`.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/2401.08417; `CPOTrainer` of TRL.
    """
    _choice("loss_type", loss_type, _FREE_TYPES)
    return _free(
        chosen_logps, rejected_logps, chosen_nll, loss_type, beta, 0.0, label_smoothing, alpha, 0.0, reduction
    )


def alpha_po_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    alpha: float = 0.25,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""AlphaPO: SimPO with the reward :math:`(1 - p^{-\alpha}) / \alpha` of an answer's mean probability :math:`p`.

    Computed as :math:`-\mathrm{expm1}(-\alpha \log p) / \alpha`, which is finite where :math:`p` itself underflows.
    With :math:`u = \beta (R_c - R_r) - \gamma` the loss of a pair is :math:`-(1 - \varepsilon) \log \sigma(u)
    - \varepsilon \log \sigma(-u)`.

    Args:
        chosen_logps, rejected_logps: mean log-probabilities :math:`\log p` of the tokens of an answer, of one shape,
            mostly `(N)`; float32, float64, bfloat16 or float16.
        alpha: :math:`\alpha`; 0 is SimPO. Default: 0.25.
        beta: :math:`\beta > 0`. Default: 2.
        gamma: the margin :math:`\gamma`. Default: 0.5.
        label_smoothing: :math:`\varepsilon` in [0, 1]. Default: 0.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/2501.03884; `CPOConfig(loss_type="alphapo")` of TRL.
    """
    return _free(
        chosen_logps, rejected_logps, None, "sigmoid", beta, gamma, label_smoothing, 0.0, alpha, reduction
    )


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    r"""Odds ratio preference optimisation.

    The loss of a pair is :math:`\mathrm{nll} - \beta \log \sigma(\mathrm{odds}(c) - \mathrm{odds}(r))` with
    :math:`\mathrm{odds}(x) = x - \log(1 - e^x)`. Value and gradient are finite up to the largest
    log-probability below 0.

    Args:
        chosen_logps, rejected_logps: :math:`c, r < 0`, mean log-probabilities of the tokens of an answer, of one
            shape, mostly `(N)`; float32, float64, bfloat16 or float16.
        chosen_nll: negative log-likelihood of the chosen answers, same shape. Default: :math:`-c`.
        beta: :math:`\beta > 0`. Default: 0.1.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/2403.07691; `ORPOTrainer` of TRL.
    """
    mode, beta = check_reduction(reduction), _beta(beta)
    c, r, n = same_shape(chosen_logps=chosen_logps, rejected_logps=rejected_logps, chosen_nll=chosen_nll)
    return _head(_orpo, (c, r, zeros_like(c) if n is None else n), [beta, float(n is None)], mode)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Pairwise loss of a reward model (Bradley and Terry), with margin, weight, smoothing and centering.

    With :math:`u = r_c - r_r - m` the loss of a pair is

    .. math:: w \left[-(1 - \varepsilon) \log \sigma(u) - \varepsilon \log \sigma(-u) + k\, (r_c + r_r)^2\right]

    Args:
        chosen, rejected: rewards :math:`r_c` and :math:`r_r`, of one shape, mostly `(N)`; float32, float64, bfloat16
            or float16.
        margin: :math:`m`, same shape. Default: 0.
        weight: :math:`w`, same shape; pairs of weight 0 count nothing whatever they hold. Default: 1.
        label_smoothing: :math:`\varepsilon` in [0, 1]. Default: 0.
        center_coefficient: :math:`k`, draws the rewards towards a mean of 0. Default: 0.
        reduction: `"none"`, `"mean"` (over the pairs, whatever their weights) or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: Bradley and Terry 1952; margin, weight and smoothing https://arxiv.org/abs/2401.06080; `RewardTrainer` of
    TRL (`center_rewards_coefficient`).
    """
    mode = check_reduction(reduction)
    numbers = [_smoothing(label_smoothing), check_number("center_coefficient", center_coefficient)]
    c, r, m, w = same_shape(chosen=chosen, rejected=rejected, margin=margin, weight=weight)
    return _head(_bradley_terry, (c, r, zeros_like(c) if m is None else m), numbers, mode, w)


# ---- registration


def _logps(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(*shape, low=-6.0, high=-0.05)


def _pairs(*names: str):
    return lambda draw, shape: {name: _logps(draw, shape) for name in names}


def _traffic(inputs: int):
    """Read once; with gradients, which are written in the same pass."""
    return lambda shape, itemsize, backward: (2 if backward else 1) * inputs * math.prod(shape) * itemsize


_SHAPES = ((7, 1), (3, 33), (2, 1025), (2, 5, 3))
_BENCH = (64, 4096)
_DPO_INPUTS = (
    "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps",
)  # fmt: skip

register(
    Loss(
        name="dpo_loss",
        family="preference",
        function=dpo_loss,
        reference=reference.dpo_loss,
        replaces="trl.DPOTrainer.dpo_loss",
        inputs=_pairs(*_DPO_INPUTS),
        wrt=_DPO_INPUTS,
        forward_arguments=(*_DPO_INPUTS, "chosen_lengths", "rejected_lengths"),
        cases={
            "sigmoid": {},
            "ipo": {
                "loss_type": "ipo",
                "chosen_lengths": lambda d, s: 1.0 + d.index(9, *s),
                "rejected_lengths": lambda d, s: 1.0 + d.index(9, *s),
            },
        },
        shapes=_SHAPES,
        bench_shape=_BENCH,
        traffic=_traffic(4),
    )
)
register(
    Loss(
        name="kto_loss",
        family="preference",
        function=kto_loss,
        reference=reference.kto_loss,
        replaces="trl.KTOTrainer.kto_loss",
        inputs=lambda d, s: {
            "policy_logps": _logps(d, s),
            "reference_logps": _logps(d, s),
            "labels": d.index(2, *s).bool(),
        },
        wrt=("policy_logps", "reference_logps"),
        forward_arguments=("policy_logps", "reference_logps", "labels", "kl"),
        cases={
            "plain": {},
            "weights": {
                "kl": lambda d, s: d.uniform(*s),
                "desirable_weight": 1.5,
                "undesirable_weight": 0.75,
                "reduction": "none",
            },
        },
        shapes=_SHAPES,
        bench_shape=_BENCH,
        traffic=_traffic(3),
    )
)
for _function, _cases in (
    (simpo_loss, {"plain": {}}),
    (
        cpo_loss,
        {
            "plain": {},
            "nll": {"chosen_nll": _logps, "alpha": 0.5, "label_smoothing": 0.1, "reduction": "none"},
        },
    ),
    (alpha_po_loss, {"smoothed": {"alpha": 0.5, "label_smoothing": 0.1, "reduction": "sum"}}),
    (orpo_loss, {"plain": {}}),
):
    _names = (
        "chosen_logps",
        "rejected_logps",
        *(("chosen_nll",) if _function in (cpo_loss, orpo_loss) else ()),
    )
    register(
        Loss(
            name=_function.__name__,
            family="preference",
            function=_function,
            reference=getattr(reference, _function.__name__),
            inputs=_pairs("chosen_logps", "rejected_logps"),
            wrt=_names,
            forward_arguments=_names,
            cases=_cases,
            shapes=_SHAPES,
            bench_shape=_BENCH,
            traffic=_traffic(2),
        )
    )
register(
    Loss(
        name="bradley_terry_loss",
        family="preference",
        function=bradley_terry_loss,
        reference=reference.bradley_terry_loss,
        inputs=lambda d, s: {"chosen": d.normal(*s, scale=3.0), "rejected": d.normal(*s, scale=3.0)},
        wrt=("chosen", "rejected", "margin"),
        forward_arguments=("chosen", "rejected", "margin", "weight"),
        cases={
            "plain": {},
            "everything": {
                "margin": lambda d, s: d.uniform(*s),
                "weight": lambda d, s: d.index(3, *s).to(d.dtype),
                "label_smoothing": 0.1,
                "center_coefficient": 0.01,
                "reduction": "sum",
            },
        },
        shapes=_SHAPES,
        bench_shape=_BENCH,
        traffic=_traffic(2),
    )
)
