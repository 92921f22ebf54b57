"""No operator of torch that a call runs, beside the kernels, adds up or writes in an order that may change."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from support import differentiable, every_case, requiring, some_dtypes, upstream_like
from support.operators import Operators, is_deterministic, past_the_dispatcher
from torch import Tensor

from fastloss import recipes
from fastloss._ops import autograd
from fastloss._registry import InputSampler
from fastloss._registry.accuracy import is_float
from fastloss._registry.spec import estimators

REPEATED = ("target", "targets", "labels", "index", "group_ids", "chosen_labels", "rejected_labels")
"""Classes and groups of rows; if all are one, whatever is added up by class or group meets at one place."""

AGAIN = {
    "ctc_loss": "the reference looks up classes that repeat; the derivative of `gather` adds them up by atomics"
}
"""Losses whose second derivatives are not deterministic on CUDA, and why."""


def calls(loss, case: str, dtype: torch.dtype, device: str):
    """Arguments of calls: as they are drawn, and with classes that are all one."""
    shape = min((s for s in loss.shapes if min(s) > 1), key=math.prod)
    kwargs = loss.call(case, InputSampler(dtype, device), shape)
    yield kwargs
    repeated = {k: v for k, v in kwargs.items() if k in REPEATED and not is_float(v)}
    if repeated:
        yield kwargs | {k: torch.full_like(v, v.flatten()[0].item()) for k, v in repeated.items()}


def on_cpu(device: str) -> bool:
    """Whether CPU kernels run on this device of the tests, and not those of CUDA."""
    return autograd.runs_on_cpu(torch.empty(0, device=device))


def run(function: Callable[[], object], inputs: list[Tensor], order: int) -> None:
    """Call, and differentiate with respect to the inputs `order` times."""
    found = function()
    values = [v for v in ((found,) if isinstance(found, Tensor) else found) if isinstance(v, Tensor)]
    for left in reversed(range(order)):
        values = [v for v in values if v.requires_grad]
        if values and inputs:
            upstream = [upstream_like(v) for v in values]
            found = torch.autograd.grad(values, inputs, upstream, allow_unused=True, create_graph=left > 0)
            values = [v for v in found if v is not None]


def watched(function: Callable[[], object], inputs: list[Tensor], order: int, device: str) -> dict[str, int]:
    """Return the operators that are not deterministic on the device in question, on both roads to the kernels."""
    cuda = not on_cpu(device)
    found: dict[str, int] = {}
    for road in (past_the_dispatcher, contextlib.nullcontext):
        with road(), Operators(cuda) as seen:
            run(function, inputs, order)
        found |= seen.found
    return found


def check(
    loss, case: str, order: int, device: str, dtype: torch.dtype = torch.float32, *, everything: bool = False
) -> None:
    """With `everything` the gradients of auxiliary inputs, such as weights, are asked for too."""
    for kwargs in calls(loss, case, dtype, device):
        names = [k for k, v in kwargs.items() if is_float(v)] if everything else differentiable(loss, kwargs)
        kwargs = requiring(kwargs, names)
        found = watched(
            lambda kwargs=kwargs: loss.function(**kwargs), [kwargs[n] for n in names], order, device
        )
        assert not found, f"{loss.name}, case {case}: {found}"


@some_dtypes
@every_case
def test_value_and_gradients(loss, case, dtype, device):
    check(loss, case, 1, device, dtype)


@every_case
def test_derivatives_by_the_reference(loss, case, device):
    """Second ones, and those of auxiliary inputs, on CUDA."""
    if on_cpu(device):
        pytest.skip("these derivatives are torch's, and on the CPU it adds up those of indexing by atomics")
    if loss.name in AGAIN:
        with pytest.raises(AssertionError, match=loss.name):
            check(loss, case, 2, device, everything=True)
        return
    check(loss, case, 2, device, everything=True)


@pytest.mark.parametrize("entry", estimators.values(), ids=lambda entry: entry.name)
def test_estimators(entry, device):
    for case in entry.cases:
        check(entry, case, 2, device, everything=True)


def test_recipes(device):
    draw = InputSampler(device=device)
    logits, q = draw.normal(6, 5).requires_grad_(), draw.normal(6, 4).requires_grad_()
    answers, paths = draw.normal(3).requires_grad_(), draw.normal(6).requires_grad_()
    same, rewards = torch.ones(6, dtype=torch.int64, device=device), draw.normal(6)
    some = {
        "cringe_loss": (lambda: recipes.cringe_loss(logits, same, top_k=3), [logits]),
        "rog_loss": (lambda: recipes.rog_loss(answers, paths, same), [answers, paths]),
        "deep_rag_imitation_loss": (lambda: recipes.deep_rag_imitation_loss(logits, same), [logits]),
        "q_learning_loss": (lambda: recipes.q_learning_loss(q, same, rewards, q.detach()), [q]),
        "double_q_learning_loss": (
            lambda: recipes.q_learning_loss(q, same, rewards, q.detach(), next_q_online=q, huber_delta=1.0),
            [q],
        ),
        "reward_regression_loss": (lambda: recipes.reward_regression_loss(paths, rewards), [paths]),
        "l2_regularization": (lambda: recipes.l2_regularization([q, logits], 0.1), [q, logits]),
    }
    for name, (function, inputs) in some.items():
        assert not watched(function, inputs, 2, device), name


# ---- what the check finds -------------------------------------------------------------------------------


def found_by(function: Callable[..., object], *inputs: Tensor, cuda: bool = True) -> set[str]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    with Operators(cuda) as seen:
        run(lambda: function(*inputs), inputs, 1)
    return {name.partition(".")[0].removesuffix("_") for name in seen.found}


once, twice = torch.tensor([2, 0, 1]), torch.tensor([2, 0, 2])


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x, i: x.index_select(0, i), "index_add"),
        (lambda x, i: x.gather(0, i.unsqueeze(1).expand(3, 4)), "scatter_add"),
        (lambda x, i: x.index_copy(0, i, x[:3]), "index_copy"),
        (lambda x, i: x.scatter(0, i.unsqueeze(1).expand(3, 4), x[:3]), "scatter"),
        (lambda x, i: x.index_put((i, i), x[0, 0] * i), "index_put"),
        (lambda x, i: x.index_add(0, i, x[:3]), "index_add"),
    ],
    ids=["index_select", "gather", "index_copy", "scatter", "index_put", "index_add"],
)
def test_places_that_repeat_are_found(function, operator):
    x = torch.randn(4, 4)
    assert found_by(lambda x: function(x, once), x) == set()
    assert operator in found_by(lambda x: function(x, twice), x)


def test_other_operators_are_found():
    x = torch.randn(3, 4)
    assert found_by(lambda x: x.cumsum(-1), x) == {"cumsum"}
    assert found_by(lambda x: x.logcumsumexp(-1), x) >= {"logcumsumexp"}
    assert found_by(lambda x: x.kthvalue(2)[0], x) == {"kthvalue"}
    assert found_by(lambda x: torch.nn.functional.interpolate(x[None], scale_factor=2, mode="linear"), x)
    assert found_by(lambda x: (x > 0).cumsum(-1) * x, x) == set()
    assert found_by(lambda x: x.sort()[0] * x.amax() + x.topk(2)[0].sum(), x) == set()


def test_sums_by_indexing_are_sorted_on_cuda_alone():
    x = torch.randn(4, 4)
    assert found_by(lambda x: x[twice], x) == set()
    assert found_by(lambda x: x[twice], x, cuda=False) == {"index_put"}
    assert found_by(lambda x: x[once], x, cuda=False) == set()
    assert found_by(lambda x: x.index_select(0, twice), x, cuda=False) == set()


def test_names_are_those_of_torch():
    """A name that torch does not know would never be found."""
    from support import operators

    names = (
        getattr(operators, group) for group in ("ADD", "REDUCE", "COPY", "PUT", "SCANS", "ALWAYS", "SILENT")
    )
    for name in (n.partition(".")[0] for group in names for n in group):
        assert hasattr(torch.ops.aten, name) or hasattr(torch.ops.aten, f"{name}_"), name
    assert is_deterministic(torch.ops.aten.add.Tensor, (torch.ones(1), torch.ones(1)), {})
