"""Preference and reward heads: of log-probabilities of whole answers, or of rewards, each in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import reference
from fastloss._checks import check_floating, check_number, check_real, check_reduction, check_tensors
from fastloss._heads import (
    BENCH,
    SHAPES,
    choice,
    head,
    logps,
    of_logps,
    positive_beta,
    same_shape,
    smoothing_in,
    traffic_of,
    zeros_like,
)
from fastloss._registry import Loss, register
from fastloss.pointwise import element_op
from fastloss.reference.preference import DPO_TYPES

__all__ = [
    "alpha_po_loss",
    "bradley_terry_loss",
    "cpo_loss",
    "kto_loss",
    "orpo_loss",
    "simpo_loss",
]

_formulas = reference.preference
_kto = element_op("kto_loss", _formulas.kto_element, inputs=4, wrt=(0, 1))
_reference_free = element_op("reference_free", _formulas.reference_free_element, inputs=3, wrt=(0, 1, 2))
_orpo = element_op("orpo_loss", _formulas.orpo_element, inputs=3, wrt=(0, 1, 2))
_bradley_terry = element_op("bradley_terry_loss", _formulas.bradley_terry_element, inputs=3, wrt=(0, 1, 2))


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
    r"""Kahneman-Tversky optimisation from unpaired completions labelled desirable or undesirable.

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
    choice("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    mode = check_reduction(reduction)
    numbers = [
        positive_beta(beta), check_number("desirable_weight", desirable_weight),
        check_number("undesirable_weight", undesirable_weight),
    ]  # fmt: skip
    lp, ref = same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    check_tensors(lp, labels=labels, kl=kl)
    check_real(labels=labels)
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
    return head(_kto, (lp, ref, labels if labels.dtype == torch.bool else labels > 0, point), numbers, mode)


_FREE_TYPES = ("sigmoid", "hinge", "ipo")


def _free(chosen, rejected, nll, loss_type, beta, margin, smoothing, nll_weight, alpha, reduction) -> Tensor:
    mode = check_reduction(reduction)
    if smoothing_in(smoothing) and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing: {loss_type} has none")
    c, r, n = same_shape(chosen_logps=chosen, rejected_logps=rejected, chosen_nll=nll)
    numbers = [
        float(DPO_TYPES.index(loss_type)), positive_beta(beta), check_number("gamma", margin), float(smoothing),
        0.0 if n is None else check_number("alpha", nll_weight), check_number("alpha", alpha),
    ]  # fmt: skip
    return head(_reference_free, (c, r, zeros_like(c) if n is None else n), numbers, mode)


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
    choice("loss_type", loss_type, ("sigmoid", "hinge"))
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
    r"""Contrastive preference optimisation: DPO with a uniform reference, plus NLL of the chosen completion.

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
    choice("loss_type", loss_type, _FREE_TYPES)
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
    r"""AlphaPO: SimPO with the reward :math:`(1 - p^{-\alpha}) / \alpha`, :math:`p` a completion's mean probability.

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
    mode, beta = check_reduction(reduction), positive_beta(beta)
    c, r, n = same_shape(chosen_logps=chosen_logps, rejected_logps=rejected_logps, chosen_nll=chosen_nll)
    return head(_orpo, (c, r, zeros_like(c) if n is None else n), [beta, float(n is None)], mode)


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
    numbers = [smoothing_in(label_smoothing), check_number("center_coefficient", center_coefficient)]
    c, r, m, w = same_shape(chosen=chosen, rejected=rejected, margin=margin, weight=weight)
    return head(_bradley_terry, (c, r, zeros_like(c) if m is None else m), numbers, mode, w)


# ---- registration


register(
    Loss(
        name="kto_loss",
        family="preference",
        function=kto_loss,
        reference=reference.kto_loss,
        replaces="trl.KTOTrainer.kto_loss",
        inputs=lambda d, s: {
            "policy_logps": logps(d, s),
            "reference_logps": logps(d, s),
            "labels": d.index(2, *s).bool(),
        },
        wrt=("policy_logps", "reference_logps"),
        trained=("policy_logps",),
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
        shapes=SHAPES,
        bench_shape=BENCH,
        traffic=traffic_of(3, 1),
    )
)
for _function, _cases in (
    (simpo_loss, {"plain": {}}),
    (
        cpo_loss,
        {
            "plain": {},
            "nll": {"chosen_nll": logps, "alpha": 0.5, "label_smoothing": 0.1, "reduction": "none"},
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
            inputs=of_logps("chosen_logps", "rejected_logps"),
            wrt=_names,
            forward_arguments=_names,
            cases=_cases,
            shapes=SHAPES,
            bench_shape=BENCH,
            traffic=traffic_of(2, 2),
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
        shapes=SHAPES,
        bench_shape=BENCH,
        traffic=traffic_of(2, 2),
    )
)
