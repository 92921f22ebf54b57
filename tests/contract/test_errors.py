"""Bad arguments raise the error that PyTorch raises for them, and name the argument.

Each valid call is spoiled in one place and given to both. Where PyTorch raises, fastloss raises the same
type; where PyTorch accepts the call after all, fastloss gives the same value or says what is wrong.
"""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from support import (
    every_loss,
    is_float,
    is_weight,
    make,
    requiring,
    some_cases,
    tensors,
)

from fastloss._registry import InputSampler, entries


def one_row_less(x):
    return x[1:] if x.ndim else x


def one_row_more(x):
    return torch.cat([x, x[:1]]) if x.ndim else x


def one_column_less(x):
    return x[..., 1:] if x.ndim else x


def one_dimension_more(x):
    return x.unsqueeze(-1)


def one_dimension_less(x):
    return x.flatten()[0] if x.ndim else x


def other_kind(x):
    """Integers for floating-point numbers and the other way round."""
    return x.detach().long() if x.is_floating_point() else x.double()


def narrow_integers(x):
    return x if x.is_floating_point() else x.to(torch.int16)


def booleans(x):
    return x.detach() > 0


def complex_numbers(x):
    return x.detach().to(torch.complex64)


def not_a_tensor(x):
    return x.tolist()


INTEGERS = (torch.bool, torch.int16, torch.int64)
SPOIL = (
    one_row_less,
    one_row_more,
    one_column_less,
    one_dimension_more,
    one_dimension_less,
    other_kind,
    narrow_integers,
    booleans,
    complex_numbers,
    not_a_tensor,
)


def outcome(function, *args, **kwargs):
    """The value, or the error."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error


def names_an_argument(error, names) -> bool:
    """It does, and does not say where in the source it was found."""
    assert not re.search(r"csrc|\.(cpp|cuh?|h):\d", str(error)), str(error)
    return any(re.search(rf"\b{name}\b", str(error), re.IGNORECASE) for name in names)


def on(device, kwargs):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def torch_outcome(loss, kwargs):
    """Call PyTorch with those of the arguments that it knows; the flag says whether it knows all.

    It is told weights of integers and of booleans in floating point: it takes them in some places and not in others.
    Asked on the CPU: on a GPU a class that does not exist ends the process.
    """
    function = loss.eager or loss.reference
    known = {k: v for k, v in on("cpu", kwargs).items() if k in inspect.signature(function).parameters}
    for name, value in tensors(known).items():
        if is_weight(loss, name) and value.dtype in INTEGERS:
            known[name] = value.float()
    return outcome(function, **known), len(known) == len(kwargs)


def assert_as_torch(loss, kwargs, name):
    ours = outcome(loss.function, **kwargs)
    theirs, knows_all = torch_outcome(loss, kwargs)
    if isinstance(theirs, AttributeError):  # torch came upon it by accident
        theirs = TypeError(str(theirs))
    if isinstance(theirs, Exception):
        wanted = f"PyTorch raises {type(theirs).__name__}: {theirs}"
        # without a counterpart in this torch the kind of error is an accident of the reference; an AttributeError is a
        # type that was not checked
        module, _, function = loss.replaces.rpartition(".")
        in_torch = module == "torch.nn.functional" and hasattr(torch.nn.functional, function)
        kind = type(theirs) if in_torch else Exception
        kind = TypeError if kind is AttributeError else kind
        assert isinstance(ours, kind), f"{name} spoiled: {ours!r}; {wanted}"
    if isinstance(ours, Exception):
        assert isinstance(ours, (RuntimeError, TypeError, ValueError, LookupError)), f"{name}: {ours!r}"
        assert names_an_argument(ours, [*tensors(kwargs), name]), f"{name}: no argument is named: {ours}"
    elif knows_all:
        torch.testing.assert_close(ours, theirs, check_device=False, equal_nan=True)


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda f: f.__name__)
@some_cases
def test_spoiled_tensor(loss, case, spoil, device):
    kwargs = requiring(make(loss, case, torch.float32, device), [])
    for name, value in tensors(kwargs).items():
        bad = spoil(value)
        if bad is value:
            continue
        if name in inspect.signature(loss.eager or loss.reference).parameters:
            assert_as_torch(loss, kwargs | {name: bad}, name)
        else:
            ours = outcome(loss.function, **kwargs | {name: bad})
            if is_weight(loss, name) and getattr(bad, "dtype", None) in INTEGERS:
                continue  # tests/contract/test_arguments.py: it weighs what it is in floating point
            assert isinstance(ours, (RuntimeError, TypeError, ValueError)), f"{name} spoiled: {ours!r}"
            assert names_an_argument(ours, [name]), f"does not name {name}: {ours}"


@pytest.mark.parametrize("index", [10**6, 2**40, -1, -(2**40)])
@some_cases
def test_index_out_of_range(loss, case, index, real_device):
    """Raised where the host can see it; on a GPU what the CPU raises for is NaN, and nothing ends the process."""
    kwargs = requiring(make(loss, case, torch.float32, real_device), [])
    for name, value in tensors(kwargs).items():
        if is_float(value):
            continue
        bad = value.clone()
        bad.view(-1)[-1] = index
        if real_device == "cpu":
            assert_as_torch(loss, kwargs | {name: bad}, name)
        else:
            ours = loss.function(**kwargs | {name: bad})
            expected = outcome(loss.function, **on("cpu", kwargs | {name: bad}))
            if isinstance(expected, Exception):
                assert ours.isnan().any(), f"{name}: the CPU raises {expected!r}"
            else:  # ids may be any numbers
                torch.testing.assert_close(ours, expected, check_device=False, equal_nan=True)


@some_cases
def test_other_device(loss, case, device):
    """One argument on another device than the rest."""
    kwargs = requiring(make(loss, case, torch.float32, device), [])
    if len(tensors(kwargs)) == 1:
        return  # nothing to be apart from
    for name, value in tensors(kwargs).items():
        with pytest.raises((RuntimeError, NotImplementedError), match="device"):
            loss.function(**kwargs | {name: value.to("meta")})


@some_cases
def test_other_floating_point_type(loss, case, device):
    """Mixed types: PyTorch's error or PyTorch's result."""
    kwargs = requiring(make(loss, case, torch.float32, device), [])
    for name, value in tensors(kwargs).items():
        if is_float(value) and name in inspect.signature(loss.eager or loss.reference).parameters:
            assert_as_torch(loss, kwargs | {name: value.double()}, name)


@every_loss
def test_missing_and_unknown_arguments(loss, device):
    kwargs = make(loss, next(iter(loss.cases)), torch.float32, device)
    with pytest.raises(TypeError):
        loss.function(**kwargs, no_such_argument=1)
    for name in tensors(kwargs):
        with pytest.raises(TypeError, match=name):
            loss.function(**{k: v for k, v in kwargs.items() if k != name})


def string_options(loss) -> list[str]:
    """Return the arguments that take one of several names, or a sequence of them."""
    return [
        name
        for name, parameter in inspect.signature(loss.function).parameters.items()
        if re.search(r"\bstr\b", str(parameter.annotation))
    ]


def names_of(loss, option) -> set[str]:
    """Return those of an option's values that its default and the cases hold."""
    values = [case.get(option) for case in loss.cases.values()]
    values.append(inspect.signature(loss.function).parameters[option].default)
    listed = [[value] if isinstance(value, str) else value or () for value in values]
    return {name for several in listed for name in several}


@pytest.mark.parametrize("of", ["function", "reference"])
@pytest.mark.parametrize(
    ("loss", "option"),
    [pytest.param(e, name, id=f"{e.name}-{name}") for e in entries() for name in string_options(e)],
)
def test_unknown_option(loss, option, of):
    """No formula stands for what is not listed; the error names the argument, the reference's also the choices."""
    shape = min((s for s in loss.shapes if min(s) > 1), key=math.prod)
    kwargs = loss.call(next(iter(loss.cases)), InputSampler(), shape)
    several = isinstance(inspect.signature(loss.function).parameters[option].default, tuple)
    for value in ("no_such", "", *(name.title() for name in names_of(loss, option))):
        with pytest.raises(ValueError, match=rf"\b{option}\b") as raised:
            getattr(loss, of)(**kwargs | {option: (value,) if several else value})
        missing = {name for name in names_of(loss, option) if name not in str(raised.value)}
        assert of == "function" or not missing, f"not listed: {missing}: {raised.value}"


@some_cases
def test_nothing_is_ignored_silently(loss, case, device):
    """Every floating-point option takes part: with another value the result is another, or an error."""
    kwargs = requiring(make(loss, case, torch.float64, device), [])
    value = loss.function(**kwargs)
    for name, option in kwargs.items():
        if isinstance(option, float):
            changed = outcome(loss.function, **kwargs | {name: option * 0.5})
            same = isinstance(changed, torch.Tensor) and torch.equal(changed, value)
            assert not same, f"{name} has no effect"


@some_cases
def test_errors_leave_no_trace(loss, case, device):
    """After an error in the middle of a call the next call is right."""
    kwargs = make(loss, case, torch.float32, device)
    expected = loss.function(**kwargs)
    for name, value in tensors(kwargs).items():
        outcome(loss.function, **kwargs | {name: one_row_less(value)})
        if not is_float(value) and torch.device(device).type == "cpu":
            outcome(loss.function, **kwargs | {name: value + 10**6})
    assert torch.equal(loss.function(**kwargs), expected)
