"""What the tests share: calls drawn from the registry, their exact answers, how far apart two answers are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloss._registry import InputSampler, Loss, accuracy, losses
from fastloss._registry.accuracy import DTYPES as DTYPES
from fastloss._registry.accuracy import Answer as Answer
from fastloss._registry.accuracy import Yardstick as Yardstick
from fastloss._registry.accuracy import evaluate, is_float
from fastloss._registry.accuracy import exact as exact
from fastloss._registry.accuracy import name_of as dtype_id
from fastloss._registry.accuracy import upstream_like as upstream_like

Kwargs = dict[str, Any]


def has_argument(loss: Loss, name: str) -> bool:
    return name in inspect.signature(loss.function).parameters


def has_reductions(loss: Loss) -> bool:
    return has_argument(loss, "reduction")


def is_weight(loss: Loss, name: str) -> bool:
    """Whether an argument weighs or selects; the `weight` of angular margins is that of a layer."""
    if name == "weight":
        return loss.family != "angular_margin"
    return name in ("sample_weight", "pos_weight", "mask", "alpha")


def _first_and_last(cases: Mapping[str, Any]) -> list[str]:
    names = list(cases)
    return names if len(names) < 3 else [names[0], names[-1]]


def _cases(keep: Callable[[Loss], bool], few: bool = False) -> pytest.MarkDecorator:
    params = [
        pytest.param(loss, case, id=f"{loss.name}-{case}")
        for loss in filter(keep, losses())
        for case in (_first_and_last(loss.cases) if few else loss.cases)
    ]
    return pytest.mark.parametrize(("loss", "case"), params)


# What a loss does not keep of the contract yet, by the test's name, and why. These are expected to fail, and must.
_TWICE = "the gradients of both inputs are made, also where one is wanted"
_SOFT = "labels that are distributions go through torch's operations, whose sums depend on the batch"
_SORTED = "a cohort's order and its sums in float64 are several times as large as its scores"
_SWAPPED = "the positive is an argument of two calls, whose gradients are rounded before they are added"
_ALPHAS = "the alphas, 2 L + 1 for each step, are as large as the input where there are so few classes"
_COMPOSED = (
    "it is put together from two losses and torch's operations, whose results are tensors of the input's size"
)
_ROW_STATE = "what its rows save, a quarter of the input, is taken from the C library, which keeps it"
_OF_REWARDS = (
    "differences of two rewards near the largest number are infinite in the kernel, not in plain PyTorch"
)
EXCEPTIONS = {
    "test_half_types_are_rounded_once[*-kl_div-batchmean]": "the sum is rounded before it is divided by the batch",
    "test_half_types_are_rounded_once[*-triplet_margin_loss-swap]": _SWAPPED,
    "test_half_types_are_rounded_once[*-triplet_margin_loss-everything]": _SWAPPED,
    "test_opcheck[*-number_token_loss-plain-*]": (
        "the logits of the number tokens are few: torch's operations on them are all there is"
    ),
    "test_as_far_as_the_type_reaches[*-k_way_ranking_loss-plackett_luce-float32]": _OF_REWARDS,
    "test_as_far_as_the_type_reaches[*-k_way_ranking_loss-plackett_luce-bfloat16]": _OF_REWARDS,
    "test_buffer_is_used_again[cosine_embedding_loss]": _TWICE,
    "test_memory_from_outside[cosine_embedding_loss]": _TWICE,
    "test_other_rows_of_the_batch[*-number_token_loss-soft-float32]": _SOFT,
    "test_memory_from_outside[ctc_loss]": _ALPHAS,
    "test_memory_from_outside[k_way_ranking_loss]": _ROW_STATE,
    "test_memory_from_outside[detailed_balance_loss]": _COMPOSED,
    "test_buffer_is_used_again[detailed_balance_loss]": _COMPOSED,
    "test_nothing_is_taken_without_gradient[detailed_balance_loss]": _COMPOSED,
    "test_memory_from_outside[cox_ph_loss]": _SORTED,
}


every_loss = pytest.mark.parametrize("loss", losses(), ids=lambda loss: loss.name)
# of every family the first: for what lies below the losses, in memory
one_of_each_family = pytest.mark.parametrize(
    "loss",
    list({loss.family: loss for loss in reversed(losses()) if not loss.multiplies}.values()),
    ids=lambda loss: loss.name,
)
# rows, elements, scans: for what lies below the families
one_of_each_driver = pytest.mark.parametrize(
    "loss", losses("cross_entropy", "mse_loss", "ctc_loss"), ids=lambda loss: loss.name
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
some_dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
every_case = _cases(lambda loss: True)
# the plainest and the fullest case: for what the machinery around a loss promises, not its formula
some_cases = _cases(lambda loss: True, few=True)
fullest_case = pytest.mark.parametrize(
    ("loss", "case"),
    [pytest.param(loss, list(loss.cases)[-1], id=f"{loss.name}-{list(loss.cases)[-1]}") for loss in losses()],
)
# the plainest case in bfloat16 and the fullest in float32; both, where there is only one: for what takes long
some_cases_in_one_dtype = pytest.mark.parametrize(
    ("loss", "case", "dtype"),
    [
        pytest.param(loss, case, dtype, id=f"{loss.name}-{case}-{dtype_id(dtype)}")
        for loss in losses()
        for case, dtype in zip(
            (next(iter(loss.cases)), list(loss.cases)[-1]), (torch.bfloat16, torch.float32), strict=True
        )
    ],
)
every_in_place_case = _cases(lambda loss: has_argument(loss, "inplace_backward"))


# ---- calls ----------------------------------------------------------------------------------------------


def tensors(kwargs: Kwargs) -> dict[str, Tensor]:
    return {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}


def differentiable(loss: Loss, kwargs: Kwargs) -> list[str]:
    return accuracy.differentiable(kwargs, loss.wrt)


def small_shape(loss: Loss) -> tuple[int, ...]:
    """The smallest listed shape in which nothing is degenerate."""
    return min((s for s in loss.shapes if min(s) > 1 and len(s) > 1), key=math.prod)


def tiny_shape(loss: Loss) -> tuple[int, ...]:
    """For numerical differentiation."""
    return tuple(min(n, 4) for n in small_shape(loss))


def make(
    loss: Loss,
    case: str,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    **more: Any,
) -> Kwargs:
    """Arguments of one call, with `requires_grad` where the loss is differentiable."""
    kwargs = loss.call(case, InputSampler(dtype, device, seed), shape or small_shape(loss)) | more
    return requiring(kwargs, differentiable(loss, kwargs))


def requiring(kwargs: Kwargs, names: list[str]) -> Kwargs:
    return {k: v.detach().requires_grad_(k in names) if is_float(v) else v for k, v in kwargs.items()}


def _numbers(loss: Loss, case: str) -> list[str]:
    kwargs = make(loss, case)
    return [name for name in differentiable(loss, kwargs) if kwargs[name].dim() == 0]


# of a single number the gradient is one sum, whose terms may cancel: how well depends on the seed
every_case_of_a_number = pytest.mark.parametrize(
    ("loss", "case"),
    [
        pytest.param(loss, case, id=f"{loss.name}-{case}")
        for loss in losses()
        for case in loss.cases
        if _numbers(loss, case)
    ],
)


def copied(kwargs: Kwargs) -> Kwargs:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def of_tensors(loss: Loss, kwargs: Kwargs, names: list[str]) -> Callable[..., Tensor]:
    """The call as a function of the named arguments, in that order."""
    return lambda *values: loss.function(**kwargs | dict(zip(names, values, strict=True)))


# ---- answers --------------------------------------------------------------------------------------------


def fused(loss: Loss, kwargs: Kwargs, names: list[str], upstream: Tensor | None = None) -> Answer:
    return evaluate(loss.function, kwargs, names, upstream)


def bits(x: Tensor) -> Tensor:
    """As integers, so that NaN equals NaN and 0 differs from -0."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    x = x.detach().contiguous()
    return x.view(integer[x.element_size()]) if x.is_floating_point() else x


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_same_bits(a: Answer, b: Answer, what: str) -> None:
    for (name, x), (_, y) in zip(a.parts(), b.parts(), strict=True):
        assert same_bits(x, y), f"{what}: {name} differs, by at most {(x.double() - y.double()).abs().max()}"


def assert_right(
    loss: Loss,
    kwargs: Kwargs,
    upstream: Tensor | None = None,
    rounded_once: bool = False,
    yardstick: Yardstick | None = None,
) -> Answer:
    """Value and gradients of one call keep the rule of `fastloss._registry.accuracy`; returns them.

    Calls of the same numbers may share a yardstick.
    """
    names = differentiable(loss, kwargs)
    yardstick = yardstick or Yardstick(loss, kwargs, names, upstream)
    got = fused(loss, kwargs, names, upstream)
    wrong = [str(found) for found in yardstick.findings(got, rounded_once) if not found.ok]
    assert not wrong, "; ".join(wrong)
    return got
