"""Losses that know the values of number tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.number_token import (
    cross_entropy_with_number_token_loss,
    gaussian_cross_entropy,
    number_token_loss,
)


def _labels(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    """Draw labels: number tokens, other tokens and ignored ones."""
    labels = draw.index(min(9, shape[-1]), *shape[:-1])
    return torch.where(draw.index(5, *shape[:-1]) == 0, -100, labels)


def _tokens(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    some = torch.tensor([1, 2, 4, 5, 6, 7, 8], device=draw.device)
    some = some[some < shape[-1]] if shape[-1] > 1 else some[:1] - 1
    values = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 0.5, 3.0])[: len(some)]
    return {"token_ids": some, "token_values": values.to(draw.device, draw.dtype)}


def _inputs(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    logits = draw.normal(*shape, scale=2.0)
    return {"logits": logits, "labels": _labels(draw, shape), **_tokens(draw, shape)}


def _traffic(shape: tuple[int, ...], itemsize: int, backward: bool) -> int:
    return (2 if backward else 1) * math.prod(shape) * itemsize


_CASES = {
    "plain": {},
    "squash": {"reweigh": True, "squash_factor": 3.0},
    "mse": {"kind": "mse", "reweigh": True},
}
_SOFT = {
    "soft": {
        "labels": lambda d, s: d.simplex(*s[:-1], len(_tokens(d, s)["token_ids"]), dim=-1),
        "reweigh": True,
    }
}
for _function, _reference, _more in (
    (cross_entropy_with_number_token_loss, reference.cross_entropy_with_number_token_loss, {}),
    (number_token_loss, reference.number_token_loss, _SOFT),
):
    register(
        Loss(
            name=_function.__name__,
            family="number_token",
            function=_function,
            reference=_reference,
            inputs=_inputs,
            wrt=("logits",),
            cases=_CASES | _more,
            shapes=((9, 33), (3, 1030)),
            bench_shape=(4096, 32000),
            traffic=_traffic,
        )
    )
register(
    Loss(
        name="gaussian_cross_entropy",
        family="number_token",
        function=gaussian_cross_entropy,
        reference=reference.gaussian_cross_entropy,
        inputs=lambda draw, shape: {
            "input": draw.normal(*shape, scale=3.0),
            "target": draw.index(shape[1], shape[0], *shape[2:]),
        },
        wrt=("input",),
        cases={
            "plain": {},
            "values": {
                "sigma": 0.8,
                "target": lambda d, s: torch.where(
                    d.index(4, s[0], *s[2:]) == 0, -100, d.index(min(9, s[1]), s[0], *s[2:])
                ),
                "token_ids": lambda d, s: _tokens(d, s[:2])["token_ids"],
                "token_values": lambda d, s: _tokens(d, s[:2])["token_values"],
            },
        },
        shapes=((9, 33), (3, 1030), (2, 17, 3)),
        bench_shape=(4096, 32000),
        traffic=_traffic,
    )
)
