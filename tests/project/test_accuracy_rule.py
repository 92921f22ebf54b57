"""The accuracy rule accepts any order of summation, also where terms cancel, and refuses what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastloss._registry import Loss, accuracy
from fastloss._registry.accuracy import Answer, RandomRounding, Yardstick, evaluate

SEEDS = range(20)
ROWS, CLASSES = 24, 33
LANES = (1, 4, 8, 16, 32)  # of no vectors, and of sse2, avx2 and avx512 with one or two of them
UNIT = torch.finfo(torch.float32).eps / 2


def scaled_cross_entropy(input: Tensor, target: Tensor, temperature: Tensor) -> Tensor:
    logits = input / temperature
    return (logits.logsumexp(1) - logits.gather(1, target[:, None]).squeeze(1)).sum()


def entry(reference: Callable[..., Tensor], *wrt: str) -> Loss:
    return Loss(
        name=reference.__name__,
        family="classification",
        function=reference,
        reference=reference,
        inputs=lambda draw, shape: {},
        wrt=wrt,
        cases={"plain": {}},
        shapes=((ROWS, CLASSES),),
        bench_shape=(ROWS, CLASSES),
        traffic=lambda shape, itemsize, backward: 0,
        forward_arguments=(),
    )


LOSS = entry(scaled_cross_entropy, "input", "temperature")


def best_temperature(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A call at the temperature that fits best, where the terms of its gradient add up to nothing."""
    draw = torch.Generator().manual_seed(seed)
    input = torch.randn(ROWS, CLASSES, generator=draw).to(dtype)
    target = torch.where(torch.rand(ROWS, generator=draw) < 0.5, input.argmax(1), input.argsort(1)[:, -4])
    low, high = 0.05, 20.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        given = {"input": input.double(), "target": target, "temperature": torch.tensor(middle).double()}
        falls = evaluate(LOSS.reference, given, ("temperature",)).grads["temperature"] < 0
        low, high = (middle, high) if falls else (low, middle)
    return {"input": input, "target": target, "temperature": torch.tensor(middle).to(dtype)}


def in_lanes(terms: Tensor, lanes: int) -> Tensor:
    """The sum as a vector of so many lanes makes it: each by itself from first to last, then halves."""
    flat = terms.flatten()
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % lanes)]).view(-1, lanes)
    total = padded[0]
    for row in padded[1:]:
        total = total + row
    while total.numel() > 1:
        total = total[: total.numel() // 2] + total[total.numel() // 2 :]
    return total[0]


def kernel(
    input: Tensor,
    target: Tensor,
    temperature: Tensor,
    lanes: int,
    change: Callable[[Tensor], Tensor] = lambda terms: terms,
) -> Answer:
    """Value and gradients by formula, in the order of that many lanes; `change` is made to the terms of a sum."""
    logits = input / temperature
    upstream = accuracy.upstream_like(temperature)
    lse = logits.logsumexp(1)
    value = in_lanes(lse - logits.gather(1, target[:, None]).squeeze(1), lanes)
    of_logits = (logits - lse[:, None]).exp()
    of_logits = upstream * of_logits.scatter_add(1, target[:, None], -torch.ones_like(lse)[:, None])
    of_temperature = -in_lanes(change(of_logits * logits), lanes) / temperature
    return Answer(value, {"input": of_logits / temperature, "temperature": of_temperature})


def wrong(yardstick: Yardstick, got: Answer) -> set[str]:
    return {found.quantity for found in yardstick.findings(got) if not found.ok}


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=accuracy.name_of)
def test_the_order_of_a_sum_is_free(dtype):
    """Even of one whose terms cancel, on every width of a vector and any seed."""
    of_eager_alone = 0
    for seed in SEEDS:
        call = best_temperature(seed, dtype)
        yardstick = Yardstick(LOSS, call)
        working = accuracy.cast(call, accuracy.working_precision(LOSS, dtype))
        for lanes in LANES:
            got = kernel(**working, lanes=lanes)
            got = Answer(got.value.to(dtype), {name: grad.to(dtype) for name, grad in got.grads.items()})
            assert not wrong(yardstick, got), (seed, lanes)
            error = (got.grads["temperature"].double() - yardstick.exact.grads["temperature"]).abs().item()
            last_digits = accuracy.ULPS[dtype] * accuracy.ulp(yardstick.exact.grads["temperature"], dtype)
            eager = accuracy.EAGER_FACTOR * yardstick.errors_of_eager["gradient of temperature"]
            of_eager_alone += error > last_digits.item() + eager
    if dtype is torch.float32:
        assert of_eager_alone > len(SEEDS) * len(LANES) // 20, "these calls are not ill-conditioned"


def drop_last_row(terms: Tensor) -> Tensor:
    return terms[:-1]


def drop_one_term(terms: Tensor) -> Tensor:
    """The one of median size."""
    return terms.flatten()[terms.flatten().abs().argsort()[: terms.numel() // 2 + 1].flip(0)[1:]]


def drop_median_term(terms: Tensor) -> Tensor:
    kept = terms.clone().flatten()
    kept[kept.abs().argsort()[kept.numel() // 2]] = 0
    return kept


def scale_one_row(terms: Tensor) -> Tensor:
    return torch.cat([terms[:1] * 1.001, terms[1:]])


def round_terms(terms: Tensor) -> Tensor:
    return terms.bfloat16().to(terms)


@pytest.mark.parametrize(
    "mistake",
    [drop_last_row, drop_median_term, scale_one_row, round_terms],
    ids=lambda mistake: mistake.__name__,
)
def test_a_mistake_in_a_sum_that_cancels_is_found(mistake):
    for seed in SEEDS:
        call = best_temperature(seed)
        got = kernel(**call, lanes=8, change=mistake)
        assert wrong(Yardstick(LOSS, call), got) == {"gradient of temperature"}, seed
