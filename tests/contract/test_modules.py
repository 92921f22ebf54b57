"""Every loss as a module: its signature, options, state, copies and errors."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from support import differentiable, every_case, every_loss, fused, make, same_bits, some_cases, tensors
from torch.nn import Parameter

from fastloss import nn
from fastloss._registry import losses

# A class has its function's name but for capitals, underscores and "Loss", or torch's abbreviation.
ABBREVIATED = {"binary_cross_entropy": "BCELoss", "binary_cross_entropy_with_logits": "BCEWithLogitsLoss"}

# What a class has beside its function's arguments, and what it has in their place.
OPEN_CLIP = {"cache_labels", "rank", "world_size", "output_dict"}
ADDED = {
    "ClipLoss": OPEN_CLIP | {"local_loss", "gather_with_grad", "use_horovod"},
    "SigLipLoss": OPEN_CLIP | {"dist_impl"},
    "LinearCrossEntropyLoss": {"in_features", "num_classes", "out_features", "bias", "device", "dtype"},
}
OWNED = {"LinearCrossEntropyLoss": {"linear_weight": "weight", "linear_bias": "bias"}}


def module_class(loss):
    def plain(name):
        return name.lower().replace("_", "").removesuffix("loss")

    wanted = ABBREVIATED.get(loss.name)
    found = [n for n in nn.__all__ if n == wanted or (not wanted and plain(n) == plain(loss.name))]
    assert len(found) == 1, f"fastloss.nn has {found or 'no class'} for {loss.name}"
    return getattr(nn, found[0])


def parameters(function):
    return {n: p for n, p in inspect.signature(function).parameters.items() if n != "self"}


def options_and_inputs(cls):
    return parameters(cls.__init__), parameters(cls.forward)


def built(loss, kwargs, **more):
    """The module of these arguments, and the rest of them, for its call; the constructor takes what both could."""
    cls = module_class(loss)
    options = parameters(cls.__init__)
    owned = OWNED.get(cls.__name__, {})
    given = {k: v for k, v in kwargs.items() if k in options}
    if owned:
        classes, features = kwargs["linear_weight"].shape
        given |= {"in_features": features, "num_classes": classes, "bias": "linear_bias" in kwargs}
    module = cls(**given | more)
    for name, at in owned.items():
        if name in kwargs:
            setattr(module.linear, at, Parameter(kwargs[name].detach()))
    return module, {k: v for k, v in kwargs.items() if k not in given and k not in owned}


def gradients(loss, module, kwargs, value):
    owned = OWNED.get(type(module).__name__, {})
    leaves = [
        getattr(module.linear, owned[n]) if n in owned else kwargs[n] for n in differentiable(loss, kwargs)
    ]
    return torch.autograd.grad(value, leaves, torch.ones_like(value))


def tensor_options():
    """Every option that may be a tensor, with a case in which it is one."""
    found = []
    for loss in losses():
        for name, p in parameters(module_class(loss).__init__).items():
            if "Tensor" in p.annotation:
                case = next(c for c in loss.cases if name in tensors(make(loss, c)))
                found.append(pytest.param(loss, case, name, id=f"{loss.name}-{name}"))
    return found


every_tensor_option = pytest.mark.parametrize(("loss", "case", "name"), tensor_options())


# ---- names and signatures ----------------------------------------------------------------------------------


def test_public_names_are_the_modules_of_the_losses():
    imported = {}
    exec("from fastloss.nn import *", imported)
    del imported["__builtins__"]
    assert {c.__name__ for c in map(module_class, losses())} == set(nn.__all__) == set(imported)
    assert list(nn.__all__) == sorted(nn.__all__) and not any(n.startswith("_") for n in nn.__all__)


@every_loss
def test_class(loss):
    cls = module_class(loss)
    assert issubclass(cls, torch.nn.Module)
    assert "__init__" in vars(cls) and "forward" in vars(cls) and "__signature__" not in vars(cls)
    assert f"`fastloss.functional.{loss.name}`" in cls.__doc__


@every_loss
def test_constructor_and_call_take_the_functions_arguments(loss):
    """Each once, in its order, with its default; those of the call that replace an option have none."""
    cls = module_class(loss)
    theirs = {n: p for n, p in parameters(loss.function).items() if n not in OWNED.get(cls.__name__, {})}
    options, inputs = (
        {n: p for n, p in taken.items() if n not in ADDED.get(cls.__name__, {})}
        for taken in options_and_inputs(cls)
    )
    assert options.keys() | inputs.keys() == theirs.keys()
    for taken in (options, inputs):
        positional = [n for n, p in taken.items() if p.kind is not p.KEYWORD_ONLY]
        assert positional == [n for n in theirs if n in positional]
        assert not any(theirs[n].kind is inspect.Parameter.KEYWORD_ONLY for n in positional)
    assert all(p.kind is theirs[n].kind for n, p in options.items())
    both = options.keys() & inputs.keys()
    for name, p in (options | inputs).items():
        if name in both:
            assert (p.kind, p.default) == (p.KEYWORD_ONLY, None), name
            assert options[name].default == theirs[name].default, name
        else:
            assert p.default == theirs[name].default, name
    for name in both:
        assert "Tensor" in options[name].annotation, f"{name} is no tensor that a model could learn"


@every_loss
def test_leading_arguments_of_a_call_are_the_functions(loss):
    if module_class(loss).__name__ in OWNED:
        return
    added = ADDED.get(module_class(loss).__name__, {})
    inputs = parameters(module_class(loss).forward).values()
    leading = [p.name for p in inputs if p.kind is not p.KEYWORD_ONLY and p.name not in added]
    assert leading == list(parameters(loss.function))[: len(leading)]


# ---- values and gradients ----------------------------------------------------------------------------------


@every_case
def test_module_calls_the_function(loss, case):
    kwargs = make(loss, case, torch.float32)
    module, inputs = built(loss, kwargs)
    expected = loss.function(**kwargs)
    assert same_bits(module(**inputs), expected)
    leading = [
        n for n, p in parameters(module.forward).items() if p.kind is not p.KEYWORD_ONLY and n in inputs
    ]
    by_name = {n: v for n, v in inputs.items() if n not in leading}
    assert same_bits(module(*(inputs[n] for n in leading), **by_name), expected)


@some_cases
def test_module_is_differentiable_as_the_function_is(loss, case):
    kwargs = make(loss, case, torch.float32)
    module, inputs = built(loss, kwargs)
    value = module(**inputs)
    expected = fused(loss, kwargs, differentiable(loss, kwargs), torch.ones_like(value))
    found = gradients(loss, module, kwargs, value)
    assert all(same_bits(g, e) for g, e in zip(found, expected.grads.values(), strict=True))


@every_tensor_option
def test_call_may_replace_an_option(loss, case, name):
    kwargs = make(loss, case, torch.float32)
    module, inputs = built(loss, kwargs)
    if name not in parameters(module.forward):
        with pytest.raises(TypeError, match=rf"{type(module).__name__}\.forward\(\).*'{name}'"):
            module(**inputs, **{name: kwargs[name]})
        return
    other = kwargs[name].detach() * 1.5
    assert same_bits(module(**inputs, **{name: other}), loss.function(**kwargs | {name: other}))
    assert same_bits(module(**inputs), loss.function(**kwargs)), "the option is as before"


# ---- errors ------------------------------------------------------------------------------------------------


@every_loss
def test_surplus_arguments_are_refused(loss):
    kwargs = make(loss, next(iter(loss.cases)), torch.float32)
    module, inputs = built(loss, kwargs)
    cls = type(module)
    options, taken = options_and_inputs(cls)
    count = sum(p.kind is not p.KEYWORD_ONLY for p in taken.values())
    with pytest.raises(TypeError, match=rf"{cls.__name__}\.forward\(\)"):
        module(*[next(iter(inputs.values()))] * (count + 1))
    with pytest.raises(TypeError, match=rf"{cls.__name__}\.forward\(\).*'no_such_input'"):
        module(**inputs, no_such_input=1)
    for name in options.keys() - taken.keys():
        with pytest.raises(TypeError, match=rf"{cls.__name__}\.forward\(\).*'{name}'"):
            module(**inputs, **{name: None})
    count = sum(p.kind is not p.KEYWORD_ONLY for p in options.values())
    with pytest.raises(TypeError, match=rf"{cls.__name__}\.__init__\(\)"):
        cls(*[None] * (count + 1))
    with pytest.raises(TypeError, match=rf"{cls.__name__}\.__init__\(\).*'no_such_option'"):
        cls(no_such_option=1)


# ---- options and state -------------------------------------------------------------------------------------


@some_cases
def test_module_survives_copies(loss, case):
    module, inputs = built(loss, make(loss, case, torch.float32))
    expected = module(**inputs)
    restored = copy.deepcopy(module)
    restored.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), restored):
        assert type(other) is type(module)
        assert same_bits(other(**inputs), expected)
        assert repr(other) == repr(module)


@every_case
def test_module_tells_its_options(loss, case):
    kwargs = make(loss, case, torch.float32)
    text = repr(built(loss, kwargs)[0])
    options = parameters(module_class(loss).__init__)
    assert module_class(loss).__name__ in text
    for name in options.keys() & kwargs.keys():
        value = kwargs[name]
        if isinstance(value, torch.Tensor):
            assert f"{name}=Tensor{tuple(value.shape)}" in text, f"{text} does not show {name}"
        else:
            assert (f"{name}={value!r}" in text) == (value != options[name].default), text


@every_case
def test_module_moves_with_its_tensors(loss, case):
    """Tensors given to the constructor are buffers: they follow `.to()` and stand in the state."""
    kwargs = make(loss, case, torch.float32)
    module, inputs = built(loss, kwargs)
    held = tensors(kwargs).keys() & parameters(module_class(loss).__init__).keys()
    assert {n for n, _ in module.named_buffers()} == held
    assert {n for n in module.state_dict() if "." not in n} == held
    wide = {
        k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    assert module.double()(**wide).dtype == torch.float64


@every_tensor_option
@pytest.mark.parametrize("when", ["given", "set"])
@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_tensor_is_registered(loss, case, name, when, kind):
    kwargs = make(loss, case, torch.float32)
    value = kwargs[name].detach()
    if kind == "parameter":
        value = Parameter(
            value, requires_grad=value.is_floating_point() and name in differentiable(loss, kwargs)
        )
    if when == "given":
        module, inputs = built(loss, kwargs | {name: value})
    else:
        required = parameters(module_class(loss).__init__)[name].default is inspect.Parameter.empty
        without = kwargs if required else {k: v for k, v in kwargs.items() if k != name}
        module, inputs = built(loss, without)
        assert required or name not in module.state_dict()
        setattr(module, name, value)
    found = dict(module.named_buffers() if kind == "buffer" else module.named_parameters())
    assert getattr(module, name) is value and found[name] is value and name in module.state_dict()
    result = module(**inputs)
    assert same_bits(result, loss.function(**kwargs))
    if value.requires_grad:
        result.sum().backward()
        expected = fused(loss, kwargs, [name], torch.ones_like(result)).grads[name]
        assert same_bits(value.grad, expected)


def test_options_of_a_users_own_class():
    class Scaled(nn.InfoNCELoss):
        def __init__(self, scale, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = scale

        def forward(self, *args, **kwargs):
            return self.scale * super().forward(*args, **kwargs)

    module = Scaled(2.0, torch.tensor(0.2), reduction="sum")
    assert repr(module) == "Scaled(temperature=Tensor(), reduction='sum', scale=2.0)"
    module.scale = torch.tensor(3.0)
    assert set(module.state_dict()) == {"temperature", "scale"}
    x = torch.randn(3, 4)
    assert same_bits(module(x, x), 3 * nn.InfoNCELoss(0.2, "sum")(x, x))


def test_what_torch_refuses_to_set_is_refused():
    module = nn.InfoNCELoss(Parameter(torch.tensor(0.2)))
    with pytest.raises(TypeError, match="as parameter 'temperature'"):
        module.temperature = torch.tensor(0.1)
    module.temperature = None
    module.temperature = torch.tensor(0.1)
    assert list(module.state_dict()) == ["temperature"] and not list(module.parameters())
    with pytest.raises(TypeError, match="buffer 'temperature'"):
        module.temperature = 0.1


def test_modules_compile():
    """In one graph, also with options that are registered."""
    x, y = torch.randn(4, 5), torch.arange(4)
    weighted = nn.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1)
    learned = nn.InfoNCELoss(Parameter(torch.tensor(0.2)))
    for module, inputs in ((weighted, (x, y)), (learned, (x, x.flip(0)))):
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs), module(*inputs))
