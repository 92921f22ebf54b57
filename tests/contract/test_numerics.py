"""Values and gradients against the float64 reference: no worse than plain PyTorch in the same dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import (
    Answer,
    Yardstick,
    assert_right,
    copied,
    differentiable,
    every_case,
    every_case_of_a_number,
    every_dtype,
    every_loss,
    exact,
    fused,
    has_reductions,
    make,
    requiring,
    same_bits,
    small_shape,
    some_cases,
    some_dtypes,
    tensors,
)
from support.layouts import LAYOUTS, expanded, lay_each


@every_dtype
@every_case
def test_accurate(loss, case, dtype, device):
    for seed, shape in enumerate(loss.shapes):
        assert_right(loss, make(loss, case, dtype, device, shape, seed))


@every_case
def test_half_types_are_rounded_once(loss, case, real_device):
    """They are computed in float32: what eager loses by rounding after each operation excuses nothing."""
    for shape in () if loss.multiplies else loss.shapes:
        assert_right(loss, make(loss, case, torch.bfloat16, real_device, shape), rounded_once=True)


@some_dtypes
@some_cases
def test_accurate_without_gradient(loss, case, dtype, device):
    """The path that does no gradient work gives the very same value."""
    for shape in loss.shapes:
        kwargs = make(loss, case, dtype, device, shape)
        with_gradient = fused(loss, kwargs, differentiable(loss, kwargs))
        assert same_bits(fused(loss, kwargs, []).value, with_gradient.value)


@some_cases
def test_each_input_alone(loss, case, device):
    """Gradients of some inputs do not depend on which others want one."""
    kwargs = make(loss, case, torch.float32, device)
    names = differentiable(loss, kwargs)
    together = fused(loss, kwargs, names)
    for name in names:
        alone = fused(loss, kwargs, [name])
        torch.testing.assert_close(alone.grads[name], together.grads[name])


@some_cases
def test_every_reduction(loss, case, device):
    if not has_reductions(loss):
        assert "reduction" not in loss.cases[case]
        return
    for reduction in ("none", "mean", "sum"):
        assert_right(loss, make(loss, case, torch.float32, device, reduction=reduction))


@some_dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@some_cases
def test_any_layout(loss, case, layout, dtype, device):
    """Strides and alignment of all tensor arguments, and of each in turn, change nothing."""
    for shape in {small_shape(loss), *(s for s in loss.shapes if len(s) > 2)}:
        kwargs = make(loss, case, dtype, device, shape)
        names = differentiable(loss, kwargs)
        laid = lay_each(tensors(kwargs), itertools.repeat(layout))
        same = None if layout is expanded else Yardstick(loss, kwargs, names)
        for name, value in laid.items() if len(shape) < 3 else ():
            assert_right(loss, requiring(kwargs | {name: value}, names), yardstick=same)
        assert_right(loss, requiring(kwargs | laid, names), yardstick=same)


@some_dtypes
@some_cases
def test_upstream_gradient_in_any_layout(loss, case, dtype, device):
    """The upstream gradient may be expanded (`sum().backward()`), zero, negative or strided."""
    more = {"reduction": "none"} if has_reductions(loss) else {}
    kwargs = make(loss, case, dtype, device, **more)
    value = fused(loss, kwargs, []).value
    ramp = torch.linspace(-2, 2, 2 * value.numel(), device=device).to(dtype)
    for upstream in (
        torch.ones((), dtype=dtype, device=device).expand(value.shape),
        torch.zeros_like(value),
        ramp[: value.numel()].view(value.shape),
        ramp[::2].view(value.shape) if value.ndim < 2 else ramp.view(*value.shape, 2)[..., 1],
    ):
        assert_right(loss, kwargs, upstream)


@every_case_of_a_number
def test_gradient_of_a_number_with_any_seed(loss, case, device):
    """Its terms may cancel: the rule must not depend on how well they do for one seed in plain PyTorch."""
    for seed in range(20):
        kwargs = make(loss, case, torch.float32, device, seed=seed)
        value = fused(loss, kwargs, []).value
        assert_right(loss, kwargs, torch.linspace(-2, 2, value.numel(), device=device).view(value.shape))


@some_dtypes
@some_cases
def test_inputs_are_not_written(loss, case, dtype, device):
    for shape in loss.shapes:
        kwargs = make(loss, case, dtype, device, shape)
        before, versions = copied(kwargs), {n: v._version for n, v in tensors(kwargs).items()}
        loss.function(**kwargs).sum().backward()
        for name, value in tensors(kwargs).items():
            assert same_bits(value, before[name]), f"{name} was written"
            assert value._version == versions[name]


@some_dtypes
@some_cases
def test_nan_inputs_are_not_hidden(loss, case, dtype, device):
    """The value is NaN where the reference's is; the gradient is, and nowhere else than the reference's."""
    more = {"reduction": "none"} if has_reductions(loss) else {}
    kwargs = make(loss, case, dtype, device, **more)
    names = differentiable(loss, kwargs)
    for name in names:
        seen = 0
        for place in range(0, kwargs[name].numel(), 3):
            spoiled = kwargs[name].detach().clone()
            spoiled.view(-1)[place] = torch.nan
            spoiled = requiring(kwargs | {name: spoiled}, names)
            got, true = fused(loss, spoiled, names), exact(loss, spoiled, names)
            assert torch.equal(got.value.isnan().cpu(), true.value.isnan()), f"NaN at {place} of {name}"
            seen += (bad := bool(true.value.isnan().any()))
            # where the loss is linear in an input, its derivative by that one need not be NaN
            if true.grads[name].isnan().any() or not bad:
                assert bool(got.grads[name].isnan().any()) == bad
            for part, grad in got.grads.items():
                allowed = true.grads[part].isnan().flatten()
                if grad.shape == spoiled[name].shape:  # of |x| torch takes 0 for the derivative at NaN
                    allowed[place] = True
                assert (allowed >= grad.isnan().cpu().flatten()).all(), f"gradient of {part}"
        assert seen, f"no NaN in {name} reaches the reference's value"


@some_dtypes
@some_cases
def test_empty_batch(loss, case, dtype, device):
    for shape in loss.shapes:
        if len(shape) > 1:
            assert_right(loss, make(loss, case, dtype, device, (0, *shape[1:])))


@every_loss
def test_registered_cases_cover_both_kinds(loss):
    """The tests above are worth something only if they are run on something."""
    assert not any("inplace_backward" in case for case in loss.cases.values()), "the tests add it themselves"
    assert any(len(shape) > 1 and min(shape) > 1 for shape in loss.shapes)
    assert isinstance(fused(loss, make(loss, next(iter(loss.cases))), []), Answer)
