"""Names, modules and documentation of every registered loss."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
import subprocess
import sys

import pytest
import torch
from support import (
    differentiable,
    every_case,
    every_loss,
    fused,
    has_reductions,
    is_float,
    make,
    same_bits,
    tensors,
)

import fastloss
import fastloss.functional
import fastloss.nn
from fastloss import reference


def module_class(loss):
    """The module that calls this loss; the registry names functions, `fastloss.nn` names classes."""
    wanted = loss.name.replace("_", "").removesuffix("loss") + "loss"
    found = [c for n, c in vars(fastloss.nn).items() if inspect.isclass(c) and n.lower() == wanted]
    assert len(found) == 1, f"fastloss.nn has no one class for {loss.name}"
    return found[0]


def module_and_call(loss, case, **where):
    kwargs = make(loss, case, torch.float32, **where)
    options = {k: v for k, v in kwargs.items() if k not in loss.forward_arguments}
    module = module_class(loss)(**options)
    return module, {k: v for k, v in kwargs.items() if k in loss.forward_arguments}, kwargs


@every_loss
def test_public_names(loss):
    assert getattr(fastloss.functional, loss.name) is loss.function
    assert getattr(reference, loss.name) is loss.reference
    assert issubclass(module_class(loss), torch.nn.Module)


@every_loss
def test_reference_has_the_same_signature(loss):
    ours, plain = (inspect.signature(f).parameters for f in (loss.function, loss.reference))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in plain.values()
    ]


@every_loss
def test_docstring(loss):
    text = inspect.getdoc(loss.function)
    assert text, f"{loss.name} has no docstring"
    for section in ("Args:", "Returns:", "Raises:", "shape"):
        assert section in text, f"docstring of {loss.name} lacks {section}"
    for name in inspect.signature(loss.function).parameters:
        assert re.search(rf"\b{name}\b", text), f"docstring of {loss.name} does not mention {name}"
    assert re.search(r"[=+∑Σ]|sum_|log", text), f"docstring of {loss.name} states no formula"
    assert re.search(r"torch\.|https?://|arXiv|et al", text), f"docstring of {loss.name} names no source"
    assert inspect.getdoc(module_class(loss)), "the module has no docstring"


@pytest.mark.parametrize("name", ["distributed", "recipes"])
def test_modules_on_demand(name):
    """`import fastloss` brings them along without importing them."""
    code = f"import sys, fastloss; before = 'fastloss.{name}' in sys.modules; print(before, fastloss.{name}.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", f"fastloss.{name}"]
    assert name in dir(fastloss)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        fastloss.no_such  # noqa: B018


def test_every_public_function_is_registered_and_documented():
    from fastloss._registry import estimators, losses

    registered = {loss.name for loss in losses()} | set(estimators)
    public = {n for n in vars(fastloss.functional) if not n.startswith("_")}
    assert registered <= public
    for name in public:
        assert inspect.getdoc(getattr(fastloss.functional, name)), f"{name} has no docstring"
    for module in (fastloss, fastloss.functional, fastloss.nn, fastloss.memory, reference):
        assert inspect.getdoc(module), f"{module.__name__} has no docstring"
    for name, function in inspect.getmembers(fastloss.memory, inspect.isfunction):
        if not name.startswith("_") and function.__module__ == fastloss.memory.__name__:
            assert inspect.getdoc(function), f"fastloss.memory.{name} has no docstring"


@every_case
def test_module_calls_the_function(loss, case, device):
    module, inputs, kwargs = module_and_call(loss, case, device=device)
    assert same_bits(module(**inputs), loss.function(**kwargs))
    leading = list(itertools.takewhile(lambda name: name in inputs, loss.forward_arguments))
    by_name = {name: value for name, value in inputs.items() if name not in leading}
    assert same_bits(module(*(inputs[name] for name in leading), **by_name), module(**inputs))


@every_case
def test_module_survives_copies(loss, case):
    module, inputs, _ = module_and_call(loss, case)
    expected = module(**inputs)
    restored = copy.deepcopy(module)
    restored.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), restored):
        assert type(other) is type(module)
        assert same_bits(other(**inputs), expected)
        assert repr(other) == repr(module)


@every_case
def test_module_tells_its_options(loss, case):
    module, _, kwargs = module_and_call(loss, case)
    text = repr(module)
    assert type(module).__name__ in text
    for name, value in kwargs.items():
        if name not in loss.forward_arguments and name not in tensors(kwargs):
            assert f"{name}={value!r}" in text, f"{text} does not show {name}"


@every_case
def test_module_moves_with_its_tensors(loss, case):
    """Tensors given to the constructor are buffers: they follow `.to()` and stand in the state."""
    module, inputs, kwargs = module_and_call(loss, case)
    held = [n for n in tensors(kwargs) if n not in loss.forward_arguments]
    assert sorted(dict(module.named_buffers())) == sorted(held)
    assert not list(module.parameters())
    wide = {k: v.detach().double() if is_float(v) else v for k, v in inputs.items()}
    value = module.double()(**wide)
    assert value.dtype == torch.float64


@every_loss
def test_module_refuses_unknown_options(loss):
    with pytest.raises(TypeError):
        module_class(loss)(no_such_option=1)


@every_loss
def test_traffic_counts_bytes(loss):
    """Fewest bytes moved: grows with the element size, and with the backward."""
    forward, both = (loss.traffic(loss.bench_shape, 4, backward) for backward in (False, True))
    assert 0 < loss.traffic(loss.bench_shape, 2, False) < forward < both


@every_loss
def test_module_is_differentiable_as_the_function_is(loss):
    case = next(iter(loss.cases))
    module, inputs, kwargs = module_and_call(loss, case)
    names = differentiable(loss, kwargs)
    value = module(**inputs)
    expected = fused(loss, kwargs, names, torch.ones_like(value))
    grads = torch.autograd.grad(value, [inputs[n] for n in names], torch.ones_like(value))
    assert all(same_bits(g, e) for g, e in zip(grads, expected.grads.values(), strict=True))
    assert has_reductions(loss) == hasattr(module, "reduction")
