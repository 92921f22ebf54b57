"""Numbers and weights may come in any type that holds them; an integer is not a flag."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from support import is_weight, make, requiring, same_bits, tensors

from fastloss._registry import entries

every_entry = pytest.mark.parametrize("loss", entries(), ids=lambda loss: loss.name)


def of_kind(loss, kind) -> dict[str, inspect.Parameter]:
    """The options that are numbers of a kind, "int" or "float"."""
    parameters = inspect.signature(loss.function).parameters.items()
    single = {k: p for k, p in parameters if not re.search("Sequence|tuple", str(p.annotation))}
    return {k: p for k, p in single.items() if re.search(rf"\b{kind}\b", str(p.annotation))}


def results(loss, kwargs):
    found = loss.function(**kwargs)
    return [found] if isinstance(found, torch.Tensor) else [t for t in found if isinstance(t, torch.Tensor)]


def assert_alike(loss, kwargs, name, forms):
    first, *others = (results(loss, kwargs | {name: form}) for form in forms)
    for form, found in zip(forms[1:], others, strict=True):
        same = all(same_bits(a, b) for a, b in zip(first, found, strict=True))
        assert same, f"{name}={form!r} is not {name}={forms[0]!r}"


def calls(loss):
    """The arguments of each case, without gradients."""
    shape = min((s for s in loss.shapes if min(s) > 1), key=math.prod)
    for case in loss.cases:
        yield requiring(make(loss, case, torch.float32, shape=shape), [])


@every_entry
def test_weights_of_any_type(loss):
    """Booleans and integers weigh what they are as floating-point numbers."""
    for kwargs in calls(loss):
        for name, value in tensors(kwargs).items():
            if is_weight(loss, name):
                ones = torch.arange(value.numel()).reshape(value.shape) % 3 > 0
                assert_alike(loss, kwargs, name, [ones.float(), ones, ones.long(), ones.to(torch.uint8)])
                if value.is_floating_point():
                    many = torch.arange(value.numel()).reshape(value.shape) % 4
                    assert_alike(loss, kwargs, name, [many.float(), many, many.to(torch.int16)])


@every_entry
def test_numbers_of_any_type(loss):
    """A number of Python, of numpy, and in a tensor without dimensions."""
    numpy = pytest.importorskip("numpy")
    for kwargs in calls(loss):
        for name, parameter in of_kind(loss, "float").items():
            value = kwargs.get(name, parameter.default)
            if type(value) in (int, float):
                value = float(value)
                wide = torch.tensor(value, dtype=torch.float64)
                assert_alike(loss, kwargs, name, [value, numpy.float64(value), wide])
                if value == int(value):
                    assert_alike(loss, kwargs, name, [value, int(value), numpy.int32(value)])
        for name, parameter in of_kind(loss, "int").items():
            value = kwargs.get(name, parameter.default)
            if type(value) is int:
                assert_alike(loss, kwargs, name, [value, numpy.int64(value), torch.tensor(value)])


def is_refused(loss, kwargs, name) -> bool:
    try:
        loss.function(**kwargs)
    except TypeError as error:
        return re.search(rf"\b{name}\b", str(error)) is not None
    except ValueError:  # this case does not take the option
        pass
    return False


@every_entry
def test_what_is_no_number(loss):
    """Neither several numbers, nor one that a gradient is asked of, nor a flag for an integer, where it is used."""
    for kind in ("int", "float"):
        for name, parameter in of_kind(loss, kind).items():
            given = ["1", [1.0], 1j]
            given += [True, 1.5, torch.tensor(True)] if kind == "int" else []
            if "Tensor" not in str(parameter.annotation):
                given += [torch.ones(2), torch.tensor(1.0, requires_grad=True)]
            for value in given:
                assert any(is_refused(loss, kwargs | {name: value}, name) for kwargs in calls(loss)), value
