"""Reductions of per-sample losses to a scalar, other than their mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops import abi
from fastloss._ops.autograd import Op
from fastloss._ops.checks import (
    check_floating,
    check_number,
    check_real,
    check_same_shape,
    check_tensor,
    check_tensors,
    one_number,
)
from fastloss._ops.dtypes import accumulation_dtype, autocast_to_fp32

__all__ = ["chi2_dro_loss", "cvar_loss", "flooding_loss", "soft_ad_loss", "tilted_loss"]


_KINDS = abi.enum("Aggregate")


def _fake(losses, theta, weight, kind, number, eta, flood):
    return losses.new_empty([], dtype=accumulation_dtype(losses.dtype)), losses.new_empty(
        [abi.constant("aggregate_state")], dtype=torch.float64
    )


def _of_kind(losses, theta, weight, kind, number, eta, flood):
    return reference.aggregation.aggregated(losses, theta, weight, list(_KINDS)[kind], number, eta, flood)


_aggregate = Op("aggregate", _of_kind, _fake, tensors=3, wrt=(0, 1))


def _reduce(
    losses: Tensor,
    kind: str,
    theta: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    number: float = 0.0,
    eta: float = 0.0,
    flood: float | None = None,
) -> Tensor:
    check_tensor("losses", losses)
    check_floating("losses", losses)
    check_tensors(
        losses, theta=theta if isinstance(theta, Tensor) else None, sample_weight=sample_weight, mask=mask
    )
    check_real(sample_weight=sample_weight, mask=mask)
    for name, t in (("sample_weight", sample_weight), ("mask", mask)):
        check_same_shape(name, t, "losses", losses)
    weight = None if sample_weight is None else sample_weight.to(accumulation_dtype(losses.dtype))
    if mask is not None:
        weight = (
            (mask != 0).to(accumulation_dtype(losses.dtype))
            if weight is None
            else torch.where(mask != 0, weight, 0.0)
        )
    value = _aggregate(
        (
            losses.reshape(-1),
            one_number("theta", theta, losses),
            None if weight is None else weight.reshape(-1),
        ),
        (_KINDS[kind], number, eta, math.nan if flood is None else check_number("flood", flood)),
    )
    return value if autocast_to_fp32(losses) else value.to(losses.dtype)


def cvar_loss(
    losses: Tensor,
    q: float = 0.9,
    theta: float | Tensor | None = None,
    *,
    flood: float | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Compute the conditional value at risk: mean of the :math:`1 - q` fraction of largest losses.

    .. math:: \theta + \frac{1}{(1 - q) N} \sum_i \max(\ell_i - \theta, 0)

    Without `theta` the exact minimum over it: with the losses in descending order, :math:`k = (1 - q) N` and
    :math:`\theta = \ell_{(\lceil k \rceil)}`, it is :math:`\frac1k [\sum_{\ell_i > \theta} \ell_i + (k - n_>) \theta]`.
    Losses above :math:`\theta` have the weight 1/k, those that equal it split the rest equally, so the result and its
    gradient do not depend on the order of the samples. The formula at
    `torch.quantile(losses, q, interpolation="lower")`, of which the rank is :math:`\lfloor q (N - 1) \rfloor`, is not
    below this, and in some cases above.

    Args:
        losses: of any shape; float32, float64, bfloat16 or float16.
        q: in [0, 1); 0 is the mean. Default: 0.9.
        theta: a number, or a tensor of one, without dimensions, that may be trained: it gets a gradient. Default:
            the best one, found by a search of fixed length through the bits of the losses.
        flood: a level b, of which the result is :math:`|L - b| + b`. Default: none.
        sample_weight: weights :math:`\ge 0` of the samples, of the shape of `losses`; N is their sum. Samples of weight
            0 are ignored, even if NaN. Default: 1.
        mask: flags of the samples that count, of the shape of `losses`. Default: all.

    Returns:
        A scalar of the type of `losses` (float32 for half-precision dtypes under autocast); NaN for an empty input.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and values.

    Source: Rockafellar and Uryasev, Optimization of conditional value-at-risk, 2000,
    https://doi.org/10.21314/JOR.2000.038; ties and fractions as in their paper of 2002,
    https://doi.org/10.1016/S0378-4266(02)00271-6.
    """
    q = check_number("q", q, 0.0, 1.0)
    if q == 1:
        raise ValueError("q: expected a number below 1")
    kind = "cvar" if theta is None else "cvar_at"
    return _reduce(losses, kind, theta, sample_weight, mask, number=q, flood=flood)


def chi2_dro_loss(
    losses: Tensor,
    rho: float,
    theta: float | Tensor | None = None,
    *,
    flood: float | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Compute the chi-square DRO loss: largest expected loss in a ball around the empirical distribution.

    .. math:: \theta + \sqrt{1 + 2 \rho} \, \sqrt{\frac1N \sum_i \max(\ell_i - \theta, 0)^2}

    Its minimum over :math:`\theta`, which `theta=None` gives, is the maximum of :math:`\sum_i p_i \ell_i` over
    distributions p with :math:`\frac{1}{2 N} \sum_i (N p_i - 1)^2 \le \rho`. The derivative by :math:`\theta` is
    monotone, so the losses above the best one are found without iteration on floating point numbers, by a search of
    fixed length through the bits of the losses; with m, v and s their mean, their variance and their fraction of the
    samples, the result is :math:`m + \sqrt{((1 + 2 \rho) s - 1) v}`. It loses no digits if :math:`\theta` lies far
    below the losses, as it does for small :math:`\rho`.

    Where no loss is above a given `theta`, the derivative of the root is taken to be 0.

    Args:
        losses: of any shape; float32, float64, bfloat16 or float16.
        rho: :math:`\rho \ge 0`, the radius; 0 is the mean.
        theta: a number, or a tensor of one, without dimensions, that may be trained: it gets a gradient. Default:
            the best one.
        flood: a level b, of which the result is :math:`|L - b| + b`. Default: none.
        sample_weight: weights :math:`\ge 0` of the samples, of the shape of `losses`; N is their sum. Samples of weight
            0 are ignored, even if NaN. Default: 1.
        mask: flags of the samples that count, of the shape of `losses`. Default: all.

    Returns:
        A scalar of the type of `losses` (float32 for half-precision dtypes under autocast); NaN for an empty input.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and values.

    Source: Hashimoto et al., https://arxiv.org/abs/1806.08010; Levy et al., https://arxiv.org/abs/2010.05893.
    """
    rho = check_number("rho", rho, 0.0)
    kind = "chi2" if theta is None else "chi2_at"
    return _reduce(losses, kind, theta, sample_weight, mask, number=rho, flood=flood)


def flooding_loss(
    losses: Tensor,
    level: float,
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Compute the flooding loss, which keeps the mean loss above a threshold.

    .. math:: |\bar\ell - b| + b

    Below the level the gradient changes its sign, at the level it is 0.

    Args:
        losses: of any shape; float32, float64, bfloat16 or float16.
        level: :math:`b`.
        sample_weight: weights :math:`\ge 0` of the samples, of the shape of `losses`; the mean divides by their sum.
            Samples of weight 0 are ignored, even if NaN. Default: 1.
        mask: flags of the samples that count, of the shape of `losses`. Default: all.

    Returns:
        A scalar of the type of `losses` (float32 for half-precision dtypes under autocast); NaN for an empty input.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and values.

    Source: Ishida et al., https://arxiv.org/abs/2002.08709.
    """
    return _reduce(losses, "mean", None, sample_weight, mask, flood=check_number("level", level))


def soft_ad_loss(
    losses: Tensor,
    theta: float | Tensor,
    sigma: float = 1.0,
    eta: float = 1.0,
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Compute the soft ascent-descent loss, which pulls each sample's loss towards :math:`\theta`.

    The slope is at most :math:`\sigma`.

    .. math:: \eta \theta + \frac{\sigma^2}{N} \sum_i \rho\left(\frac{\ell_i - \theta}{\sigma}\right), \qquad
              \rho(u) = \sqrt{1 + u^2} - 1

    computed as :math:`u^2 / (1 + \sqrt{1 + u^2})`, which avoids cancellation. A smooth, per-sample version of
    `flooding_loss`.

    Args:
        losses: of any shape; float32, float64, bfloat16 or float16.
        theta: a number, or a tensor of one, without dimensions, that may be trained: it gets a gradient.
        sigma: :math:`\sigma > 0`. Default: 1.
        eta: :math:`\eta`; where theta is a constant so is its term. Default: 1.
        sample_weight: weights :math:`\ge 0` of the samples, of the shape of `losses`; N is their sum. Samples of weight
            0 are ignored, even if NaN. Default: 1.
        mask: flags of the samples that count, of the shape of `losses`. Default: all.

    Returns:
        A scalar of the type of `losses` (float32 for half-precision dtypes under autocast); NaN for an empty input.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and values.

    Source: Holland and Nakatani, https://arxiv.org/abs/2310.10006, and the code of Holland.
    """
    sigma = check_number("sigma", sigma, 0.0)
    if sigma == 0:
        raise ValueError("sigma: expected a number above 0")
    if theta is None:
        raise TypeError("theta: expected a number or a Tensor, got None")
    hparams = {"number": sigma, "eta": check_number("eta", eta)}
    return _reduce(losses, "soft_ad", theta, sample_weight, mask, **hparams)


def tilted_loss(
    losses: Tensor,
    t: float,
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Compute the tilted empirical risk, :math:`\frac1t \log \frac1N \sum_i e^{t \ell_i}`.

    From the smallest loss (:math:`t \to -\infty`) over the mean (0) to the largest (:math:`t \to \infty`). It does not
    overflow, and is as accurate as the mean for any small t: exponents are relative to the largest of them, and where
    they are near 0 it takes the logarithm of 1 + the mean of :math:`e^x - 1`.

    Args:
        losses: of any shape; float32, float64, bfloat16 or float16.
        t: any finite number.
        sample_weight: weights :math:`\ge 0` of the samples, of the shape of `losses`; N is their sum. Samples of weight
            0 are ignored, even if NaN. Default: 1.
        mask: flags of the samples that count, of the shape of `losses`. Default: all.

    Returns:
        A scalar of the type of `losses` (float32 for half-precision dtypes under autocast); NaN for an empty input.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and values.

    Source: Li et al., Tilted empirical risk minimization, https://arxiv.org/abs/2007.01162.
    """
    return _reduce(losses, "tilted", None, sample_weight, mask, number=check_number("t", t))
