"""Preference losses of log-probabilities of whole completions, each in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.checks import (
    check_floating,
    check_number,
    check_real,
    check_reduction,
    check_same_shape,
    check_tensors,
    choice,
    positive_beta,
    same_shape,
    smoothing_in,
)
from fastloss._ops.elementwise import ElementOp, call_elementwise, zeros_like

__all__ = ["alpha_po_loss", "cpo_loss", "kto_loss", "orpo_loss", "simpo_loss"]


_formulas = reference.preference
_kto = ElementOp("kto_loss", _formulas.kto_element)
_reference_free = ElementOp("reference_free", _formulas.reference_free_element)
_orpo = ElementOp("orpo_loss", _formulas.orpo_element)


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
    r"""Compute the KTO loss (Kahneman-Tversky) from unpaired completions labelled desirable or undesirable.

    With the log-ratio :math:`x` of policy and reference and the reference point :math:`z`, the loss of a completion is

    .. math:: \lambda_D\, \sigma(-\beta (x - z)) \text{ if it is desirable, else }
              \lambda_U\, \sigma(\beta (x - z)) .

    Args:
        policy_logps, reference_logps: log-probabilities of the completions, of one shape, usually `(N)`; float32,
            float64, bfloat16 or float16.
        labels: True (or positive) where the completion is desirable, of the same shape.
        kl: :math:`z`, a scalar or one number for each completion, without gradient: an estimate of the divergence of
            policy from reference, in the paper `(policy - reference).mean().clamp(min=0)` of completions to other
            prompts, averaged over all processes before the clamp. Default: 0.
        beta: :math:`\beta > 0`. Default: 0.1.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.
        desirable_weight, undesirable_weight: :math:`\lambda_D` and :math:`\lambda_U`. Default: 1.
        loss_type: `"kto"`, or `"apo_zero_unpaired"`, which takes no `kl` (:math:`z = 0`). Default: `"kto"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/2402.01306, https://arxiv.org/abs/2408.06266; `KTOTrainer` of TRL.
    """
    choice("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    mode = check_reduction(reduction)
    hparams = _kto.pack(
        beta=positive_beta(beta),
        desirable_weight=check_number("desirable_weight", desirable_weight),
        undesirable_weight=check_number("undesirable_weight", undesirable_weight),
    )
    lp, ref = same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    check_tensors(lp, labels=labels, kl=kl)
    check_real(labels=labels)
    check_same_shape("labels", labels, "policy_logps", lp)
    if kl is not None and loss_type == "apo_zero_unpaired":
        raise ValueError("kl is not supported for loss_type='apo_zero_unpaired'")
    point = zeros_like(lp)
    if kl is not None:
        check_floating("kl", kl)
        if kl.numel() != 1 and kl.shape != lp.shape:
            raise RuntimeError(f"kl: expected one number or the shape of policy_logps, got {tuple(kl.shape)}")
        dtype = torch.promote_types(lp.dtype, kl.dtype) if kl.dim() or not lp.dim() else lp.dtype
        lp, ref, point = lp.to(dtype), ref.to(dtype), kl.detach().to(dtype)
        point = point if point.shape == lp.shape else point.reshape(()).expand(lp.shape)
    return call_elementwise(
        _kto, (lp, ref, labels if labels.dtype == torch.bool else labels > 0, point), hparams, mode
    )


_REFERENCE_FREE_TYPES = _reference_free.hparams.choices["type"]


def _reference_free_loss(
    chosen, rejected, nll, loss_type, beta, margin, smoothing, nll_weight, alpha, reduction
) -> Tensor:
    mode = check_reduction(reduction)
    smoothing = smoothing_in(smoothing)
    if smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing is not supported for loss_type={loss_type!r}")
    c, r, n = same_shape(chosen_logps=chosen, rejected_logps=rejected, chosen_nll=nll)
    hparams = _reference_free.pack(
        type=loss_type, beta=positive_beta(beta), margin=check_number("gamma", margin),
        label_smoothing=smoothing, nll_weight=0.0 if n is None else check_number("alpha", nll_weight),
        alpha=check_number("alpha", alpha),
    )  # fmt: skip
    return call_elementwise(_reference_free, (c, r, zeros_like(c) if n is None else n), hparams, mode)


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the SimPO loss: preference optimisation with mean log-probabilities, a margin and no reference model.

    With :math:`u = \beta (c - r) - \gamma` the loss of a pair is :math:`-(1 - \varepsilon) \log \sigma(u)
    - \varepsilon \log \sigma(-u)`, or :math:`\max(0, 1 - u)` for `"hinge"`.

    Args:
        chosen_logps, rejected_logps: :math:`c` and :math:`r`, mean log-probabilities of the tokens of a completion, of
            one shape, usually `(N)`; float32, float64, bfloat16 or float16.
        beta: :math:`\beta > 0`. Default: 2.
        gamma: the margin :math:`\gamma`, in units of :math:`u`. Default: 0.5.
        label_smoothing: :math:`\varepsilon` in [0, 1], for `"sigmoid"`. Default: 0.
        loss_type: `"sigmoid"` or `"hinge"`. Default: `"sigmoid"`.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/2405.14734; `CPOConfig(loss_type="simpo")` of TRL.
    """
    choice("loss_type", loss_type, ("sigmoid", "hinge"))
    return _reference_free_loss(
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
    r"""Compute the CPO (contrastive preference) loss: DPO with a uniform reference, plus NLL of the chosen completion.

    The loss of a pair is :math:`-(1 - \varepsilon) \log \sigma(u) - \varepsilon \log \sigma(-u)
    + \alpha\, \mathrm{nll}` with :math:`u = \beta (c - r)`; for `"hinge"` :math:`\max(0, 1 - u)`, for `"ipo"`
    :math:`(c - r - 1 / (2 \beta))^2` in the place of the logarithms.

    Args:
        chosen_logps, rejected_logps: :math:`c` and :math:`r`, log-probabilities of the completions (for `"ipo"` their
            means), of one shape, usually `(N)`; float32, float64, bfloat16 or float16.
        chosen_nll: negative log-likelihood of the chosen completions, same shape. Default: none, no such term.
        beta: :math:`\beta > 0`. Default: 0.1.
        alpha: :math:`\alpha`, the weight of `chosen_nll`. Default: 1.
        label_smoothing: :math:`\varepsilon` in [0, 1], for `"sigmoid"`. Default: 0.
        loss_type: `"sigmoid"`, `"hinge"` or `"ipo"`. Default: `"sigmoid"`.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/2401.08417; `CPOTrainer` of TRL.
    """
    choice("loss_type", loss_type, _REFERENCE_FREE_TYPES)
    return _reference_free_loss(
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
    r"""Compute the AlphaPO loss: SimPO with the reward :math:`(1 - p^{-\alpha}) / \alpha` of the mean probability p.

    Computed as :math:`-\mathrm{expm1}(-\alpha \log p) / \alpha`, which is finite where :math:`p` itself underflows.
    With :math:`u = \beta (R_c - R_r) - \gamma` the loss of a pair is :math:`-(1 - \varepsilon) \log \sigma(u)
    - \varepsilon \log \sigma(-u)`.

    Args:
        chosen_logps, rejected_logps: mean log-probabilities :math:`\log p` of the tokens of a completion, of one shape,
            usually `(N)`; float32, float64, bfloat16 or float16.
        alpha: :math:`\alpha`; 0 is SimPO. Default: 0.25.
        beta: :math:`\beta > 0`. Default: 2.
        gamma: the margin :math:`\gamma`. Default: 0.5.
        label_smoothing: :math:`\varepsilon` in [0, 1]. Default: 0.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/2501.03884; `CPOConfig(loss_type="alphapo")` of TRL.
    """
    return _reference_free_loss(
        chosen_logps, rejected_logps, None, "sigmoid", beta, gamma, label_smoothing, 0.0, alpha, reduction
    )


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the ORPO loss (odds ratio preference optimisation).

    The loss of a pair is :math:`\mathrm{nll} - \beta \log \sigma(\mathrm{odds}(c) - \mathrm{odds}(r))` with
    :math:`\mathrm{odds}(x) = x - \log(1 - e^x)`. Value and gradient are finite for every log-probability below 0.

    Args:
        chosen_logps, rejected_logps: :math:`c, r < 0`, mean log-probabilities of the tokens of a completion, of one
            shape, usually `(N)`; float32, float64, bfloat16 or float16.
        chosen_nll: negative log-likelihood of the chosen completions, same shape. Default: :math:`-c`.
        beta: :math:`\beta > 0`. Default: 0.1.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/2403.07691; `ORPOTrainer` of TRL.
    """
    mode, beta = check_reduction(reduction), positive_beta(beta)
    c, r, n = same_shape(chosen_logps=chosen_logps, rejected_logps=rejected_logps, chosen_nll=chosen_nll)
    hparams = _orpo.pack(beta=beta, nll_from_logps=float(n is None))
    return call_elementwise(_orpo, (c, r, zeros_like(c) if n is None else n), hparams, mode)
