"""Survival analysis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.survival import cox_ph_loss, dart_loss


def _eager_cox(log_h, durations, events, ties="breslow", strata=None, reduction="mean"):
    """Compute Cox's loss in the usual way, with torch's logcumsumexp along descending times."""
    alike = [log_h, durations, events]
    usual = ties == "breslow" and strata is None and reduction != "none" and log_h.shape[-1] > 1
    if not usual or any(t.shape != log_h.shape or t.dtype != log_h.dtype for t in alike):
        return reference.cox_ph_loss(log_h, *alike[1:], ties=ties, strata=strata, reduction=reduction)
    times, order = durations.sort(dim=-1, descending=True)
    h, happened = log_h.gather(-1, order), events.gather(-1, order)
    last = (
        torch.searchsorted(-times, -times, right=True) - 1
    )  # at risk are those up to the last of equal times
    loss = -((h - h.logcumsumexp(-1).gather(-1, last)) * happened).sum()
    return loss / happened.sum() if reduction == "mean" else loss


def _of(name: str):
    def inputs(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
        times = draw.index(max(2 * shape[-1] // 3, 1), *shape) + 1  # some are tied
        return {
            name: draw.normal(*shape),
            "durations": times.to(draw.dtype),
            "events": (draw.index(3, *shape) > 0).to(draw.dtype),
        }

    return inputs


def _columns(name: str):
    """Return one cohort, every tensor a column."""
    return {
        key: lambda draw, shape, key=key: _of(name)(draw, (math.prod(shape),))[key].unsqueeze(-1)
        for key in (name, "durations", "events")
    }


for _function, _name, _cases in (
    (
        cox_ph_loss,
        "log_h",
        {
            "breslow": {},
            "efron": {"ties": "efron", "reduction": "sum"},
            "columns": _columns("log_h"),
            "strata": {"strata": lambda d, s: d.index(3, *s), "ties": "efron", "reduction": "none"},
        },
    ),
    (
        dart_loss,
        "theta",
        {
            "plain": {},
            "columns": _columns("theta"),
            "weighted": {"alpha": 0.01, "beta": 0.02, "reduction": "none"},
        },
    ),
):
    register(
        Loss(
            name=_function.__name__,
            family="survival",
            function=_function,
            reference=getattr(reference, _function.__name__),
            eager=_eager_cox if _function is cox_ph_loss else None,
            inputs=_of(_name),
            wrt=(_name,),
            cases=_cases,
            shapes=((1, 2), (3, 33), (2, 3, 5)),
            bench_shape=(16, 2048),
            traffic=lambda shape, itemsize, backward: (5 if backward else 3) * math.prod(shape) * itemsize,
            related="pycox.models.loss.cox_ph_loss" if _name == "log_h" else "",
        )
    )
