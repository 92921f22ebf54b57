"""Losses of censored survival times: one sort, then one scan along the cohort in each direction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops import abi
from fastloss._ops.autograd import Op, contiguous_like
from fastloss._ops.checks import (
    check_floating,
    check_number,
    check_real,
    check_reduction,
    check_same_shape,
    check_tensor,
    check_tensors,
    choice,
)
from fastloss._ops.dtypes import autocast_to_fp32

__all__ = ["cox_ph_loss", "dart_loss"]


_KINDS = abi.enum("Survival")


def _by_individual(order: Tensor, at_place: Tensor) -> Tensor:
    return torch.empty_like(at_place).scatter(-1, order, at_place)


def _terms(score, log_time, events, order, group, stratum, kind, efron, alpha, beta, each):
    if kind == _KINDS["cox"]:
        strata = None if stratum is None else _by_individual(order, stratum)
        loss = reference.survival.cox_terms(score, -_by_individual(order, group), events, strata, efron)
    else:
        loss = reference.survival.dart_terms(score, log_time, events, alpha, beta)
    loss = loss.double()
    return loss if each else loss.sum()


def _fake(score, log_time, events, order, group, stratum, kind, efron, alpha, beta, each):
    state = "dart_state" if kind == _KINDS["dart"] else "cox_efron_state" if efron else "cox_state"
    return (
        score.new_empty(score.shape if each else [], dtype=torch.float64),
        score.new_empty([*score.shape, abi.constant(state)], dtype=torch.float64),
    )


_survival = Op("survival", _terms, _fake, tensors=6, gradient_like=contiguous_like)


def _cohort(name: str, score: Tensor, mode: str, **others: Tensor | None) -> tuple[Any, ...]:
    """Check shapes and dtypes; return the score and the others in one shape `(..., N)`."""
    check_reduction(mode)
    check_tensor(name, score)
    check_tensors(score, **others)
    check_floating(name, score)
    check_real(**others)
    durations = others["durations"]
    if score.shape == (*durations.shape, 1):
        score = score.squeeze(-1)
    if durations.dim() == 0:
        raise RuntimeError("durations: expected (..., N), got a tensor without dimensions")
    check_same_shape("durations", durations, name, score)
    for other, t in others.items():
        check_same_shape(other, t, "durations", durations)
    if score.dim() > 1 and score.shape[-1] == 1:  # columns: a cohort of one teaches nothing
        score, others = score.squeeze(-1), {k: t if t is None else t.squeeze(-1) for k, t in others.items()}
    return score, *others.values()


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _numbered(*keys: Tensor) -> Tensor:
    """Return the index of the run of equal keys that each element belongs to, along the last dimension."""
    first = torch.zeros_like(keys[0][..., :1], dtype=torch.bool)
    new = [torch.cat([first, key[..., 1:] != key[..., :-1]], -1) for key in keys]
    return torch.stack(new).any(0).cumsum(-1)


def _reduced(loss: Tensor, mode: str, count: Tensor | int, score: Tensor) -> Tensor:
    """Reduce the terms, or their sum, and return the dtype of the score."""
    if mode == "none":
        loss = loss.reshape(score.shape)
    elif mode == "mean":
        loss = loss / count
    return loss.to(torch.float32 if autocast_to_fp32(score) else score.dtype)


def cox_ph_loss(
    log_h: Tensor,
    durations: Tensor,
    events: Tensor,
    *,
    ties: str = "breslow",
    strata: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the negative log of Cox's partial likelihood, for a proportional hazards model.

    .. math:: L = -\frac{1}{E} \sum_{i: \delta_i = 1} \Big(h_i - \log \sum_{j: T_j \ge T_i} e^{h_j}\Big)

    with :math:`E` the number of events. Of :math:`d` events at the same time, Efron's approximation gives the l-th,
    :math:`l = 0, \ldots, d - 1` as they stand in the input, :math:`\log(R - \tfrac{l}{d} D)` in the place of
    :math:`\log R`, with :math:`R` the sum over the risk set and :math:`D` that over the tied events. Accurate for any
    range of :math:`h`: sums are kept relative to a running maximum, in float64.

    Args:
        log_h: :math:`h`, log of the relative hazard, shape `(..., N)`, or `(..., N, 1)` as a network's only output;
            float32, float64, bfloat16 or float16. Each row of N individuals is a cohort of its own. Where all tensors
            are columns `(..., N, 1)`, as of a table, the last dimension is dropped: these are cohorts of N too.
        durations: :math:`T`, times of event or of censoring, `(..., N)`, any real type, not NaN.
        events: :math:`\delta`, `(..., N)`: other than 0 where the event was seen, 0 where it was censored.
        ties: `"breslow"` or `"efron"`. Default: `"breslow"`.
        strata: integers `(..., N)`: only individuals of the same stratum are compared. Default: one stratum.
        reduction: `"mean"` over the events of all cohorts (0 if there are none), `"sum"`, or `"none"`: the terms of
            the individuals, 0 of the censored. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of shape `(..., N)`.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: Cox, https://doi.org/10.1111/j.2517-6161.1972.tb00899.x; Breslow 1974; Efron 1977. Names as in pycox
    (`pycox.models.loss.cox_ph_loss`), which neglects ties.
    """
    log_h, durations, events, strata = _cohort(
        "log_h", log_h, reduction, durations=durations, events=events, strata=strata
    )
    efron = choice("ties", ties, ("breslow", "efron")) == "efron"
    if strata is not None and strata.is_floating_point():
        raise TypeError(f"strata: expected integers, got {strata.dtype}")
    happened = _rows(events.detach() != 0)
    times, order = _rows(durations.detach()).sort(dim=-1, descending=True, stable=True)
    stratum = None
    if strata is not None:
        stratum, again = _rows(strata).gather(-1, order).sort(dim=-1, stable=True)
        times, order = times.gather(-1, again), order.gather(-1, again)
    group = _numbered(times) if stratum is None else _numbered(times, stratum)
    tensors = (_rows(log_h), None, happened, order, group, stratum)
    loss = _survival(tensors, (_KINDS["cox"], efron, 0.0, 0.0, reduction == "none"))
    return _reduced(loss, reduction, happened.sum().clamp(min=1), log_h)


def dart_loss(
    theta: Tensor,
    durations: Tensor,
    events: Tensor,
    *,
    alpha: float = 0.0,
    beta: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the DART loss: rank regression of an accelerated failure time model.

    With residuals :math:`e_i = \log T_i - \theta_i`,

    .. math:: L = \frac{1}{N^2} \sum_i \sum_j \delta_i \max(0, e_j - e_i) + \frac{\alpha}{N} \sum_i e_i^2
              + \frac{\beta}{N} \sum_i \theta_i^2

    In :math:`O(N \log N)`, exactly: the residuals are sorted; no N x N matrix is stored.

    Args:
        theta: :math:`\theta`, the predicted log of the time, shape `(..., N)`, or `(..., N, 1)` as a network's only
            output; float32, float64, bfloat16 or float16. Each row of N individuals is a cohort of its own. Where all
            tensors are columns `(..., N, 1)`, as of a table, the last dimension is dropped: these are cohorts of N too.
        durations: :math:`T > 0`, times of event or of censoring, `(..., N)`, any real type.
        events: :math:`\delta`, `(..., N)`: other than 0 where the event was seen, 0 where it was censored.
        alpha, beta: weights of the mean squares of residuals and predictions. Default: 0.
        reduction: `"mean"` over the cohorts of the above, `"sum"`: N times their sum, or `"none"`: the terms whose
            mean that is. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of shape `(..., N)`.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: Lee et al., https://arxiv.org/abs/2307.08044, and its released code.
    """
    theta, durations, events = _cohort("theta", theta, reduction, durations=durations, events=events)
    alpha, beta = check_number("alpha", alpha, 0.0), check_number("beta", beta, 0.0)
    scores, log_time = _rows(theta), _rows(durations.detach()).double().log()
    residuals, order = (log_time - scores.detach().double()).sort(dim=-1, stable=True)
    tensors = (scores, log_time, _rows(events.detach() != 0), order, _numbered(residuals), None)
    loss = _survival(tensors, (_KINDS["dart"], False, alpha, beta, reduction == "none"))
    return _reduced(loss, reduction, max(theta.numel(), 1), theta)
