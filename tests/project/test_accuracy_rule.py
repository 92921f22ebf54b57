"""The accuracy rule accepts any order of summation, also where terms cancel, and refuses what is wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss._registry import Loss, accuracy
from fastloss._registry.accuracy import Answer, Yardstick
from fastloss._registry.rounding import RandomRounding

SEEDS = range(20)
FEW_SEEDS = SEEDS[::4]  # to refuse takes all draws of the noise
ROWS, CLASSES = 24, 33
LANES = (1, 4, 8, 16, 32)  # without vectors; one of sse2, avx2 and avx512; two of avx512
UNIT = torch.finfo(torch.float32).eps / 2


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
    )


# ---- a sum whose terms cancel ---------------------------------------------------------------------------


def scaled_cross_entropy(input: Tensor, target: Tensor, temperature: Tensor) -> Tensor:
    logits = input / temperature
    return (logits.logsumexp(1) - logits.gather(1, target[:, None]).squeeze(1)).sum()


LOSS = entry(scaled_cross_entropy, "input", "temperature")
GRADIENT = "gradient of temperature"


@functools.cache
def best_temperature(seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Yardstick]:
    """A call at the temperature that fits best, where the terms of its gradient add up to nothing."""
    draw = torch.Generator().manual_seed(seed)
    input = torch.randn(ROWS, CLASSES, generator=draw).to(dtype)
    target = torch.where(torch.rand(ROWS, generator=draw) < 0.5, input.argmax(1), input.argsort(1)[:, -4])
    x, one_hot = input.double(), F.one_hot(target, CLASSES)
    low, high = 0.05, 20.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        too_low = (((x / middle).softmax(1) - one_hot) * x).sum() > 0
        low, high = (middle, high) if too_low else (low, middle)
    call = {"input": input, "target": target, "temperature": torch.tensor(middle).to(dtype)}
    return call, Yardstick(LOSS, call)


def in_lanes(terms: Tensor, lanes: int) -> Tensor:
    """The sum as vectors of so many lanes make it: each lane from first to last, then halves."""
    flat = terms.flatten()
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % lanes)]).view(-1, lanes)
    total = padded[0]
    for row in padded[1:]:
        total = total + row
    while total.numel() > 1:
        total = total[: total.numel() // 2] + total[total.numel() // 2 :]
    return total[0]


def kernel(
    call: dict[str, Tensor], lanes: int, change: Callable[[Tensor], Tensor] = lambda terms: terms
) -> Answer:
    """Value and gradients by formula, in the precision that half types are computed in, rounded once.

    `change` is made to the terms of the temperature's gradient.
    """
    dtype = call["input"].dtype
    input, target, temperature = accuracy.cast(call, accuracy.working_precision(LOSS, dtype)).values()
    logits = input / temperature
    lse = logits.logsumexp(1)
    value = in_lanes(lse - logits.gather(1, target[:, None]).squeeze(1), lanes)
    one_hot = torch.zeros_like(logits).scatter(1, target[:, None], 1.0)
    of_logits = accuracy.upstream_like(value) * ((logits - lse[:, None]).exp() - one_hot)
    of_temperature = -in_lanes(change(of_logits * logits), lanes) / temperature
    grads = {"input": (of_logits / temperature).to(dtype), "temperature": of_temperature.to(dtype)}
    return Answer(value.to(dtype), grads)


def refused(yardstick: Yardstick, got: Answer, rounded_once: bool = False) -> set[str]:
    return {found.quantity for found in yardstick.findings(got, rounded_once) if not found.ok}


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=accuracy.name_of)
def test_the_order_of_a_sum_is_free(dtype):
    """Even of one whose terms cancel, on every width of a vector and with any seed."""
    by_luck = 0
    for seed in SEEDS:
        call, yardstick = best_temperature(seed, dtype)
        exact = yardstick.exact.grads["temperature"]
        of_eager = accuracy.EAGER_FACTOR * yardstick.errors_of_eager[GRADIENT]
        for lanes in LANES:
            got = kernel(call, lanes)
            assert not refused(yardstick, got, rounded_once=dtype.itemsize == 2), (seed, lanes)
            *_, ratio = accuracy.worst_element(got.grads["temperature"], exact, of_eager)
            by_luck += ratio > 1
    if dtype is torch.float32:
        assert by_luck > len(SEEDS) // 2, "by eager's error alone many of these should be refused"


MISTAKES = {
    "lost row": lambda terms: terms[:-1],
    "lost term": lambda terms: terms.where(terms.abs() != terms.abs().median(), 0.0),
    "one row a thousandth off": lambda terms: torch.cat([terms[:1] * 1.001, terms[1:]]),
    "terms in a smaller type": lambda terms: terms.to(SMALLER[terms.dtype]).to(terms),
}
SMALLER = {torch.float64: torch.float32, torch.float32: torch.bfloat16}


@pytest.mark.parametrize("dtype", SMALLER, ids=accuracy.name_of)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_sum_that_cancels_is_found(mistake, dtype):
    for seed in FEW_SEEDS:
        call, yardstick = best_temperature(seed, dtype)
        assert refused(yardstick, kernel(call, 8, MISTAKES[mistake])) == {GRADIENT}, seed


@pytest.mark.parametrize("quantity", ["value", "gradient of input", GRADIENT])
def test_an_error_of_eight_times_the_noise_is_found(quantity):
    for seed in FEW_SEEDS:
        _, yardstick = best_temperature(seed, torch.float32)
        *_, noise = yardstick.noise()
        for times, wrong in ((1, set()), (8, {quantity})):
            parts = {name: x.clone() for name, x in yardstick.exact.parts()}
            first = parts[quantity].view(-1)[:1]
            last_digits = accuracy.ULPS[torch.float32] * accuracy.ulp(first, torch.float32)
            first += times * noise[quantity] + 0.99 * last_digits
            value, *grads = (x.float() for x in parts.values())
            got = Answer(value, dict(zip(LOSS.wrt, grads, strict=True)))
            assert refused(yardstick, got) == wrong, (seed, times)


def test_half_types_that_round_each_operation_are_found():
    for seed in FEW_SEEDS:
        _, yardstick = best_temperature(seed, torch.bfloat16)
        assert not refused(yardstick, yardstick.eager)
        assert "gradient of input" in refused(yardstick, yardstick.eager, rounded_once=True)


# ---- a long sum -----------------------------------------------------------------------------------------


def plain_sum(input: Tensor) -> Tensor:
    return input.sum()


def test_a_long_chain_of_additions_is_for_float64_alone():
    """Its error grows with the root of the number of terms; float32 has a wider type, which avoids that."""
    chains = {torch.float32: 0, torch.float64: 0}
    for seed in SEEDS:
        input = torch.rand(2**13, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for dtype in chains:
            x = input.to(dtype)
            last = torch.from_numpy(numpy.add.accumulate(x.numpy())[-1:]).view(())
            chains[dtype] += len(refused(Yardstick(entry(plain_sum), {"input": x}), Answer(last)))
    assert chains[torch.float64] == 0
    assert chains[torch.float32] > len(SEEDS) // 2


# ---- noise ----------------------------------------------------------------------------------------------


def weighted_sum(input: Tensor, weight: Tensor) -> Tensor:
    return (input * weight).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=accuracy.name_of)
def test_noise_is_what_the_formula_says(dtype):
    """Of a sum of products: each product rounds; of the sum each term and the result, or each sum so far."""
    unit = torch.finfo(dtype).eps / 2 * (1 if dtype is torch.float32 else 2)  # `exact` is float64 too
    loss, deviations = entry(weighted_sum), []
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        input, weight = torch.randn(2, 100, generator=draw).to(dtype)
        yardstick = Yardstick(loss, {"input": input, "weight": weight})
        *_, noise = yardstick.noise()
        terms, value = input.double() * weight, yardstick.exact.value
        sums = terms if dtype is torch.float32 else terms.cumsum(0)
        deviation = unit * ((terms.square().sum() + sums.square().sum() + value.square()) / 3).sqrt()
        deviations.append(noise["value"] / deviation.item())
    assert min(deviations) > 1.3  # of the largest of 32 normal variables
    assert max(deviations) < 4
    assert 2 < sum(deviations) / len(deviations) < 2.7


def difference_of_equals(input: Tensor, other: Tensor) -> Tensor:
    return (input * other - other * input).abs().sum()


def test_a_choice_among_equals_is_no_noise():
    """Rounded at random, the two are no longer equal, and the gradient jumps from 0 to plus or minus `other`."""
    draw = torch.Generator().manual_seed(0)
    input, other = torch.randn(2, 100, generator=draw)
    yardstick = Yardstick(entry(difference_of_equals, "input"), {"input": input, "other": other})
    *_, noise = yardstick.noise()
    assert not yardstick.exact.grads["input"].any()
    assert noise["gradient of input"] < 4 * UNIT * other.abs().max().item()


def results(x: Tensor) -> Iterator[tuple[str, bool, Tensor]]:
    """Results of operations, and whether they round."""
    yield "transposed", False, x.mT.clone()
    yield "picked", False, x[[1, 0]]
    yield "joined", False, torch.cat([x, x])
    yield "compared", False, torch.where(x > 0, x, -x)
    yield "largest", False, x.amax(0)
    yield "cast", False, x.float()
    yield "product", True, x * x
    yield "exponential", True, x.exp()
    yield "sum", True, x.sum(0)
    yield "product of matrices", True, x @ x.mT
    yield "in place", True, x.clone().add_(x)
    yield "indexed sum", True, x.index_add(0, torch.tensor([0]), x[:1])


def test_what_rounds_at_random():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = list(results(x))
    for unit in (2.0**-30, 2.0**-20):
        with RandomRounding(unit, seed=0):
            rounded = list(results(x))
        for (name, rounds, y), (_, _, z) in zip(exact, rounded, strict=True):
            moved = (z - y).abs().max().item()
            assert (moved > 0) == rounds, name
            assert moved < 40 * unit, name


@pytest.mark.parametrize("name", ["sum", "mm"])
def test_a_chain_rounds_every_sum_so_far(name):
    """Of n ones the k-th addition is off by up to k units: together a variance of n^3 / 9 units, relatively n / 9."""
    ones, unit = torch.ones(1, 1000, dtype=torch.float64), 2.0**-40
    moved = {(): [], (name,): []}
    for chains, errors in moved.items():
        for seed in range(100):
            with RandomRounding(unit, seed, chains):
                result = ones.sum() if name == "sum" else ones @ ones.mT
            errors.append((result.item() - 1000) / 1000 / unit)
    once, chained = (torch.tensor(errors).square().mean().sqrt().item() for errors in moved.values())
    assert once == pytest.approx(math.sqrt(1 / 3), rel=0.25)
    assert chained == pytest.approx(math.sqrt(1000 / 9), rel=0.25)
