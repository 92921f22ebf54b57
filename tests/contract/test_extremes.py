"""What does not count, what is as large as the type allows, and what is infinite."""

from __future__ import annotations

import math

import pytest
import torch
from support import (
    assert_same_bits,
    differentiable,
    dtype_id,
    exact,
    fused,
    has_argument,
    has_reductions,
    is_float,
    make,
    requiring,
    some_dtypes,
    tiny_shape,
)

import fastloss
from fastloss._registry import InputSampler, losses
from fastloss._registry.accuracy import eager

# Whose elements or rows are computed on their own, and may be left out. Of others, a row of weight 0 is still one that
# the other rows are compared with.
OF_SEPARATE_ROWS = (
    "classification", "token_statistics", "number_token", "distillation", "elementwise", "aggregation",
)  # fmt: skip
SEPARATE = [
    loss
    for loss in losses()
    if loss.family in OF_SEPARATE_ROWS or loss.name in ("dpo_loss", "bradley_terry_loss")
]
JUNK = (torch.nan, torch.inf, -torch.inf, 1e38, -1e38)


def ways_to_leave_out(loss, kwargs):
    """Calls that leave every second row or element out, one for each argument that can; and which, by input."""
    names = differentiable(loss, kwargs)
    first = kwargs[names[0]]
    labels = next(
        (n for n in ("target", "targets", "labels") if n in kwargs and not is_float(kwargs[n])), None
    )
    if labels:  # of the others all shall count
        ignored = kwargs[labels] == kwargs.get("ignore_index", -100)
        kwargs = kwargs | {labels: kwargs[labels].masked_fill(ignored, 0)}
    classes_at = 1 if loss.family == "classification" and first.dim() > 1 else first.dim() - 1
    rows = kwargs[labels].shape if labels else first.shape[:classes_at] + first.shape[classes_at + 1 :]
    places = (torch.arange(math.prod(rows), device=first.device) % 2 == 0).view(rows)
    elements = (torch.arange(first.numel(), device=first.device) % 2 == 0).view(first.shape)

    def junk_at(off):
        whole = off
        if off.shape != first.shape:
            whole = off.unsqueeze(-1 if off.shape == first.shape[:-1] else 1).expand(first.shape)
        return {n: whole for n in names if kwargs[n].shape == first.shape}

    if labels and has_argument(loss, "ignore_index"):
        yield (
            "ignored",
            kwargs | {labels: torch.where(places, kwargs.get("ignore_index", -100), kwargs[labels])},
            junk_at(places),
        )
    of_classes = loss.family == "classification"
    of_elements = loss.family not in OF_SEPARATE_ROWS or loss.family in ("elementwise", "aggregation")
    off = elements if of_elements else places
    for name in ("sample_weight", "mask", "weight"):
        if not has_argument(loss, name) or (of_classes and name == "weight"):
            continue
        given = kwargs.get(name)
        one = torch.ones(off.shape, dtype=first.dtype, device=first.device) if given is None else given
        yield name, kwargs | {name: torch.where(off, 0, one.expand(off.shape))}, junk_at(off)
    weight = {"softmax_focal_loss": "alpha"}.get(loss.name, "weight")
    if of_classes and labels and not kwargs.get("label_smoothing") and has_argument(loss, weight):
        one = torch.ones(first.shape[1], dtype=first.dtype, device=first.device)
        without = kwargs | {
            weight: one.index_fill(0, kwargs[labels].flatten()[:1], 0.0),
            "background_class": None,
        }
        without = {n: v for n, v in without.items() if has_argument(loss, n)}
        yield "class", without, junk_at(kwargs[labels] == kwargs[labels].flatten()[0])


def filled_at(x, off, value):
    """The tensor with a value, or the largest of the type, at these places."""
    top = torch.finfo(x.dtype).max
    bounded = min(max(value, -top), top) if math.isfinite(value) else value
    return x.detach().masked_fill(off, bounded)


def filled(kwargs, places, value, names):
    """The call with a value, or the largest of the type, where something is left out."""
    changed = {name: filled_at(kwargs[name], off, value) for name, off in places.items()}
    return requiring(kwargs | changed, names)


separate_cases = pytest.mark.parametrize(
    ("loss", "case"),
    [
        pytest.param(loss, case, id=f"{loss.name}-{case}")
        for loss in SEPARATE
        for case in loss.cases
        if not case.startswith("aot")  # which sorts them, and takes no weights
    ],
)


@some_dtypes
@separate_cases
def test_what_does_not_count_may_hold_anything(loss, case, dtype, device):
    """Value and gradients are those of the same call with zeros there, bit for bit."""
    kwargs = make(loss, case, dtype, device)
    names = differentiable(loss, kwargs)
    for how, call, places in ways_to_leave_out(loss, kwargs):
        expected = fused(loss, filled(call, places, 0.0, names), names)
        for junk in JUNK:
            got = fused(loss, filled(call, places, junk, names), names)
            assert_same_bits(got, expected, f"{how}, {junk}")
        for name, off in places.items():
            assert not expected.grads[name][off].any(), f"{how}: gradient of {name}"


@separate_cases
def test_what_does_not_count_has_no_second_derivative(loss, case, real_device):
    kwargs = make(loss, case, torch.float64, real_device, tiny_shape(loss))
    names = differentiable(loss, kwargs)

    def second(call):
        inputs = [call[n] for n in names]
        value = loss.function(**call).sum()
        first = torch.autograd.grad(value, inputs, create_graph=True)
        along = sum(
            (g * (1 + torch.arange(g.numel(), device=g.device).view(g.shape) % 3)).sum() for g in first
        )
        return torch.autograd.grad(along, inputs, allow_unused=True) if along.requires_grad else ()

    for how, call, places in ways_to_leave_out(loss, kwargs):
        expected = second(filled(call, places, 0.0, names))
        for junk in JUNK:
            for name, g, like in zip(
                names, second(filled(call, places, junk, names)), expected, strict=False
            ):
                assert g is None or torch.equal(g, like), f"{how}, {junk}: {name}"


def without_rows(loss, kwargs):
    """Calls that leave two of three rows out, one for each argument that can, or a class; and which rows."""
    rows, target = len(kwargs["input"]), kwargs["target"]
    off = torch.arange(rows, device=target.device).remainder(3) != 0
    if not is_float(target):
        yield "ignored", kwargs | {"target": torch.where(off, -100, target)}, off
    weight = torch.where(off, 0.0, 1.0).to(kwargs["input"].dtype)
    yield "sample_weight", kwargs | {"sample_weight": weight}, off
    if loss.name == "linear_cross_entropy" and not is_float(target) and not kwargs.get("label_smoothing"):
        classes = torch.ones_like(kwargs["linear_weight"][:, 0]).index_fill(0, target[:1].clamp(min=0), 0.0)
        yield "class", kwargs | {"weight": classes.detach()}, target == target[0].clamp(min=0)


def value_and_derivatives(function, inputs):
    """The value, its gradients, and those of their squares."""
    value = function().float().sum()
    first = torch.autograd.grad(value, inputs, create_graph=True)
    along = sum(g.float().square().sum() for g in first)
    return [value, *first, *torch.autograd.grad(along, inputs, allow_unused=True)]


def assert_all_equal(got, expected, what):
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert x is None or torch.equal(x, y), f"{what}: {i}"


@some_dtypes
@pytest.mark.parametrize(
    ("loss", "case"),
    [
        pytest.param(loss, case, id=f"{loss.name}-{case}")
        for loss in losses()
        if loss.family in ("linear", "angular_margin")
        for case in loss.cases
    ],
)
def test_hidden_states_that_do_not_count_may_hold_anything(loss, case, dtype, device):
    """The weight's gradient has no term 0 times NaN of them, nor have the second derivatives."""
    kwargs = make(loss, case, dtype, device, (7, 40, 9))
    names = differentiable(loss, kwargs)

    def derivatives(call, value):
        call = filled(call, places, value, names)
        return value_and_derivatives(lambda: loss.function(**call), [call[n] for n in names])

    for how, call, off in without_rows(loss, kwargs):
        places = {"input": off.unsqueeze(1)}
        expected = derivatives(call, 0.5)
        for junk in JUNK:
            assert_all_equal(derivatives(call, junk), expected, f"{how}, {junk}")


@some_dtypes
def test_masked_hidden_states_may_hold_anything(dtype, device):
    """As above, of the statistics of tokens and of the losses made of them."""
    draw = InputSampler(dtype, device, 0)
    hidden, weight, bias = draw.normal(2, 4, 40), draw.normal(9, 40), draw.normal(9)
    labels = draw.index(9, 2, 4)
    kept = torch.arange(8, device=labels.device).remainder(3).view(2, 4) == 0

    def of_statistics(h, w, b):
        found = fastloss.functional.linear_token_stats(h, w, labels, linear_bias=b, mask=kept)
        return sum(getattr(found, name).float().sum() for name in ("logp", "entropy", "lse", "mean_logit"))

    def of_preference(h, w, b):
        of = torch.where(kept, labels, -100)
        zero = labels.new_zeros(2, dtype=torch.float32)
        return fastloss.functional.linear_dpo_loss(h, h.flip(0), w, of, of.flip(0), zero, zero, linear_bias=b)

    for function in (of_statistics, of_preference):

        def derivatives(value, function=function):
            filled = filled_at(hidden, ~kept.unsqueeze(-1), value)
            inputs = [t.detach().requires_grad_() for t in (filled, weight, bias)]
            return value_and_derivatives(lambda: function(*inputs), inputs)

        expected = derivatives(0.0)
        for junk in JUNK:
            assert_all_equal(derivatives(junk), expected, f"{function.__name__}, {junk}")


OF_PROBABILITIES = ("binary_cross_entropy", "kl_div")
FAR_REACHING = (
    "elementwise", "classification", "aggregation", "distillation", "dpo", "preference", "reward_model",
)  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=dtype_id)
@pytest.mark.parametrize(
    ("loss", "case"),
    [
        pytest.param(loss, case, id=f"{loss.name}-{case}")
        for loss in losses()
        if loss.family in FAR_REACHING and not (loss.multiplies or loss.name in OF_PROBABILITIES)
        for case in loss.cases
    ],
)
def test_as_far_as_the_type_reaches(loss, case, dtype, device):
    """What is finite in plain PyTorch for an input near the largest number of the type is finite."""
    kwargs = make(loss, case, dtype, device)
    names = [n for n in differentiable(loss, kwargs) if kwargs[n].dim()]
    if has_reductions(loss) and "reduction" not in loss.cases[case]:
        kwargs["reduction"] = "mean"
    of_two_classes = "sigmoid" in loss.name or "binary" in loss.name  # their targets are probabilities
    for name in names[:1] if of_two_classes else names:
        large = torch.finfo(dtype).max * 0.6 * kwargs[name].detach().sign()
        spoiled = requiring(kwargs | {name: large}, names)
        got, plain = fused(loss, spoiled, names), eager(loss, spoiled, names)
        for (part, x), (_, y) in zip(got.parts(), plain.parts(), strict=True):
            if of_two_classes and part == "gradient of targets":
                continue  # twice the logit and more
            assert not (y.isfinite() & ~x.isfinite()).any(), f"{part}: {x}, in plain PyTorch {y}"


@pytest.mark.parametrize(
    ("loss", "case"),
    [
        pytest.param(loss, case, id=f"{loss.name}-{case}")
        for loss in losses()
        if loss.family in ("classification", "token_statistics", "distillation") and not loss.multiplies
        for case in loss.cases
    ],
)
def test_maximum_farther_up_than_the_type_reaches(loss, case, device):
    """From the lowest numbers of a row, over several blocks of it, to the largest, in its last classes."""
    kwargs = make(loss, case, torch.float32, device, (2, 20000))
    names = [n for n in differentiable(loss, kwargs) if kwargs[n].dim()]
    low = torch.arange(20000, device=kwargs[names[0]].device) < 19990
    target = kwargs.get("target")
    if is_float(target):
        kwargs["target"] = target.detach().masked_fill(low, 0).softmax(1).masked_fill(low, 0)
    elif target is not None:
        kwargs["target"] = target.clamp(min=19990)
    for name in names:
        if kwargs[name].shape != low.expand(2, -1).shape or name == "target":
            continue
        top = torch.finfo(torch.float32).max * 0.6
        spoiled = requiring(kwargs | {name: torch.where(low, -top, top).expand(2, -1).clone()}, names)
        got, plain = fused(loss, spoiled, names), eager(loss, spoiled, names)
        for (part, x), (_, y) in zip(got.parts(), plain.parts(), strict=True):
            assert not (y.isfinite() & ~x.isfinite()).any(), f"{part}: {x}, in plain PyTorch {y}"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=dtype_id)
@pytest.mark.parametrize(
    ("loss", "case"),
    [
        pytest.param(loss, case, id=f"{loss.name}-{case}")
        for loss in losses()
        if loss.family in ("classification", "token_statistics")
        or loss.name == "cross_entropy_with_number_token_loss"
        for case in loss.cases
    ],
)
def test_infinite_upstream_gradient(loss, case, dtype, device):
    """As a scaled loss has that overflows: no gradient is NaN that the reference has otherwise."""
    kwargs = make(loss, case, dtype, device)
    names = differentiable(loss, kwargs)
    upstream = torch.full((), torch.inf)
    got, true = fused(loss, kwargs, names, upstream), exact(loss, kwargs, names, upstream)
    for name in names:
        x, y = got.grads[name].cpu(), true.grads[name]
        assert not (x.isnan() & ~y.isnan()).any(), f"{name}: {x}, reference {y}"
        assert torch.equal(x.isfinite(), y.isfinite()) or y.isnan().any(), f"{name}: {x}, reference {y}"
