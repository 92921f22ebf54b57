"""What the registry says a loss replaces, it can be put in the place of.

Signatures begin with theirs, and a call gives their value, their warnings and their kind of error, also where shapes
broadcast and types are mixed.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from support import is_weight, make, requiring, tensors

from fastloss._registry import Loss, losses

IN_TORCH = "torch.nn.functional."
# of libraries that are not installed here
SIGNATURES = {
    "torchvision.ops.sigmoid_focal_loss": lambda inputs, targets, alpha=0.25, gamma=2, reduction="none": ...,
    "info_nce.info_nce": lambda query, positive_key, negative_keys=None, temperature=0.1, reduction="mean",
    negative_mode="unpaired": ...,
}  # fmt: skip

VARIATIONS = {
    "one row": lambda x: x[:1] if x.ndim else x,
    "one column": lambda x: x[..., :1] if x.ndim else x,
    "another dimension": lambda x: x.unsqueeze(0),
    "flat": lambda x: x.reshape(-1),
    "double": lambda x: x.double() if x.is_floating_point() else x,
    "half": lambda x: x.half() if x.is_floating_point() else x,
    "integers": lambda x: x.long() if x.is_floating_point() else x,
    "booleans": lambda x: x > 0,
}

replacing = [loss for loss in losses() if loss.replaces]
of_torch = [loss for loss in replacing if loss.replaces.startswith(IN_TORCH)]
every_replacement = pytest.mark.parametrize("loss", replacing, ids=lambda loss: loss.name)
every_torch_namesake = pytest.mark.parametrize("loss", of_torch, ids=lambda loss: loss.name)


def replaced(loss: Loss):
    if not loss.replaces.startswith(IN_TORCH):
        return SIGNATURES[loss.replaces]
    function = getattr(torch.nn.functional, loss.replaces.removeprefix(IN_TORCH), None)
    if function is None:
        pytest.skip(f"this torch has no {loss.replaces}")
    return function


def outcome(function, kwargs):
    """The value or the error, and the warnings."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            value = function(**kwargs)
        except Exception as error:
            value = error
    return value, [(w.category, str(w.message)) for w in given]


def assert_alike(loss, kwargs, what=""):
    ours, our_warnings = outcome(loss.function, kwargs)
    theirs, their_warnings = outcome(replaced(loss), kwargs)
    assert our_warnings == their_warnings, f"{what}: {our_warnings}, in torch {their_warnings}"
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), f"{what}: {ours!r}, in torch {theirs!r}"
    else:
        assert isinstance(ours, torch.Tensor), f"{what}: {ours!r}"
        # torch adds up weights in half precision
        share = {"rtol": 1e-3, "atol": 1e-5} if "half" in what else {}
        torch.testing.assert_close(ours, theirs, equal_nan=True, **share)


@every_replacement
def test_signature_begins_with_theirs(loss):
    theirs = list(inspect.signature(replaced(loss)).parameters.values())
    ours = list(inspect.signature(loss.function).parameters.values())
    for a, b in zip(ours, theirs, strict=False):
        assert (a.name, a.kind, a.default) == (b.name, b.kind, b.default)
    assert len(ours) >= len(theirs)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_no_loss_is_related_to_what_it_replaces():
    assert not [loss.name for loss in replacing if loss.related]


@pytest.mark.parametrize("variation", VARIATIONS)
@every_torch_namesake
def test_shapes_and_types(loss, variation):
    known = inspect.signature(replaced(loss)).parameters
    for case in loss.cases:
        if not set(loss.cases[case]) <= set(known):
            continue
        kwargs = requiring(make(loss, case, torch.float32), [])
        for name, value in tensors(kwargs).items():
            varied = VARIATIONS[variation](value)
            if is_weight(loss, name) and not varied.is_floating_point():
                continue  # accepted everywhere, see test_arguments.py
            if loss.name.endswith("cross_entropy") and "weight" in kwargs:
                if variation == "half":
                    continue  # weights may be float32, where torch asks for half precision too
                if name == "weight" and variation == "another dimension":
                    continue  # it is accepted for some inputs
            if loss.name == "ctc_loss" and variation not in ("double", "one row"):
                continue  # torch reads what lies behind where classes do not fit, and adds up integers
            if loss.name == "cosine_embedding_loss" and variation == "one column":
                continue  # torch takes the length of one column, and the product with all
            assert_alike(loss, kwargs | {name: varied}, f"{case}, {name}: {variation}")


@every_torch_namesake
def test_reductions(loss):
    """All that there are, in words and in torch's deprecated flags, with its warnings."""
    kwargs = requiring(make(loss, next(iter(loss.cases)), torch.float32), [])
    for reduction in ("none", "mean", "sum", "batchmean", "no_such"):
        assert_alike(loss, kwargs | {"reduction": reduction}, reduction)
    if "size_average" in inspect.signature(loss.function).parameters:
        for flags in ((True, None), (False, None), (None, False), (False, False), (True, True)):
            legacy = dict(zip(("size_average", "reduce"), flags, strict=True))
            assert_alike(loss, kwargs | legacy, str(legacy))


def test_a_warning_is_of_the_line_that_calls():
    x = torch.zeros(3, 1)
    calls = {
        loss.name: loss.function for loss in losses("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
    }
    calls |= {loss.name: loss.function for loss in losses("rmse_loss", "log_cosh_loss", "hinge_loss")}
    for name, function in calls.items():
        with pytest.warns(UserWarning, match="target size") as given:
            function(x, x.squeeze(1))
        assert [w.filename for w in given] == [__file__], name
    with pytest.warns(UserWarning, match="batchmean") as given:
        losses("kl_div")[0].function(x, x)
    assert [w.filename for w in given] == [__file__]
    with pytest.warns(UserWarning, match="size_average") as given:
        losses("cross_entropy")[0].function(x, torch.zeros(3).long(), size_average=True)
    assert [w.filename for w in given] == [__file__]


@pytest.mark.parametrize("argument", ["input", "target"])
def test_binary_cross_entropy_of_no_probability(argument):
    """An error on the CPU, as in torch; a NaN stays one."""
    (loss,) = losses("binary_cross_entropy")
    kwargs = {"input": torch.tensor([0.5, 0.2]), "target": torch.tensor([1.0, 0.0])}
    for wrong in (1.5, -0.25, torch.inf):
        bad = kwargs | {argument: torch.tensor([0.5, wrong])}
        assert_alike(loss, bad)
        with pytest.raises(RuntimeError, match=f"all elements of {argument} should be between 0 and 1"):
            loss.function(**bad)
    assert loss.function(**kwargs | {argument: torch.tensor([0.5, torch.nan])}).isnan()
    torch.vmap(loss.function)(*(t.view(2, 1) for t in kwargs.values()))
