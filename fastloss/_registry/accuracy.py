"""The accuracy rule of the tests, `check` and `bench`.

The rule, for the value and for the gradient of every differentiable argument, element by element:

    |got - exact| <= ULPS[dtype] * ulp(exact) + max(EAGER_FACTOR * eager's error, NOISE_FACTOR * noise)

`exact`: the reference in float64, at the exact values of the arguments.
`ulp`: the spacing of the dtype at that element.
eager's error: the largest |eager - exact| of the tensor, where `eager` is plain PyTorch in the dtype under test: the
    function that the loss replaces, or the reference. It is the error that users have today.
`noise`: how far the reference moves when each of its operations rounds at random to the working precision.

Why noise. Eager's error alone does not tell how well a result can be computed: the error of a scalar whose terms cancel
may by chance be a hundredth of the terms' rounding, and changes with the seed, the width of a vector and the order of a
sum. What matters is the magnitude of the terms. With unit roundoff u = eps / 2 every operation yields z (1 + d), |d| <=
u, instead of z, and a sum or a product of matrices yields the sum of terms t_i (1 + d_i). To first order an output y is
then off by

    sum over all intermediate numbers z of (dy / dz) z d_z.

The d_z are as good as independent, of mean 0 and uniform, so y is off by a normal variable whose deviation is the root
of the sum of squares of (dy / dz) z u / sqrt(3). This is the condition of the computation times u: where terms cancel,
they count with their size before they do. `noise` draws from just this distribution (Monte Carlo arithmetic): the
reference runs in float64, where a dispatch mode multiplies what each operation yields by 1 + d, and what reductions and
products take as well. That asks for no formula of a loss, and changes neither data that are only moved nor comparisons,
nor differences that are 0.

Noise is of first order. Where the d part two equal numbers after all, and the reference jumps (a sign, a choice among
equals), that excuses nothing: each draw is made with u and again with u / 2, and counts twice the difference of the
two, in which jumps cancel and terms that are linear in u stay what they are. For float64 u is 2^-40 in this and the
result is scaled, so that float64's own rounding does not show.

The noise of a tensor is the largest of DRAWS draws over all its elements. For a single number the largest of 32 is
between 1.7 and 3.2 deviations in nine of ten cases; NOISE_FACTOR 4 allows about 9, so that other operations than the
reference's, in another order, pass on any processor and seed: an error with half as large a deviation again would be
refused 4 times in a million. Of 8 draws the largest is below 1 deviation in one of twenty cases, which would be 500
times as many refusals by chance.

That a sum rounds each term once holds where it is made in short chains, pairwise, or in a wider type, as float32 sums
are and have to be. A product of matrices adds in its own type, one term after the other, and so may any sum in float64,
which has no wider type. Of such a chain each addition rounds the sum so far: term i is off by the sum of the d of all
additions from the i-th on. (Products of half-precision matrices add in float32, where a chain does not show.) In
float64 `exact` is rounded as well, by as much: the distance of the two is held to twice the noise, by the triangle
inequality.

The working precision is float32, in which half-precision dtypes are computed before they are rounded once; float64 for
float64; the dtype itself for losses that multiply matrices, which keep the factors in it.

Where `exact`, rounded to the dtype, is infinite or NaN, the result must be so too. The dtype must be eager's, the shape
the reference's. The upstream gradient is not one, so that a loss which forgets it is caught.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastloss._registry.rounding import PRODUCTS, SUMS, RandomRounding, is_float
from fastloss._registry.spec import Loss

EAGER_FACTOR = 2.0
NOISE_FACTOR = 4.0
ULPS = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 0.51, torch.float16: 0.51}
"""Half-precision dtypes are computed in float32 and rounded at the end, which costs half a unit."""
DRAWS = 32
"""Only the first of them are made where they allow the error."""
MIN_UNIT = 2.0**-40
RULE = (
    f"within {ULPS[torch.float32]:g} units in the last place (half-precision dtypes {ULPS[torch.float16]:g}) and "
    f"{EAGER_FACTOR:g} x eager's error or {NOISE_FACTOR:g} x rounding noise"
)
DTYPES = tuple(ULPS)


# ---- calls ----------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """The results of one call: its value (of an estimator: each) and the gradients by argument."""

    value: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)
    more: tuple[Tensor, ...] = ()
    """The values after the first."""

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from values_by_name((self.value, *self.more) if self.more else self.value).items()
        yield from ((f"gradient of {name}", grad) for name, grad in self.grads.items())


def values_by_name(result: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """Name the value, or each of several."""
    if isinstance(result, Tensor):
        return {"value": result}
    return {f"value {i}": value for i, value in enumerate(result, 1)}


def cast(kwargs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Convert every floating-point tensor among the arguments to `dtype`."""
    return {k: v.to(dtype) if is_float(v) else v for k, v in kwargs.items()}


def differentiable(kwargs: Mapping[str, Any], wrt: Sequence[str]) -> list[str]:
    """Return those of `wrt` that are floating-point tensors in this call."""
    return [k for k in wrt if is_float(kwargs.get(k))]


def upstream_like(value: Tensor, seed: int = 1) -> Tensor:
    """Return a fixed gradient for `value`: multiples of 1/64 in [0.5, 1.5], exact in every dtype."""
    steps = torch.randint(32, 97, value.shape, generator=torch.Generator().manual_seed(seed))
    return (steps / 64).to(value)


def evaluate(
    function: Callable[..., Any],
    kwargs: Mapping[str, Any],
    wrt: Sequence[str],
    upstream: Tensor | None = None,
) -> Answer:
    """Return the value and the gradients with respect to those of `wrt` that can have one."""
    names = differentiable(kwargs, wrt)
    leaves = {k: v.detach().requires_grad_(k in names) if is_float(v) else v for k, v in kwargs.items()}
    inputs = [leaves[name] for name in names]
    found = function(**leaves)
    values = (found,) if isinstance(found, Tensor) else tuple(found)
    graded = [v for v in values if v.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(names)
    if graded and names:
        above = [upstream_like(v) if upstream is None else upstream.to(v).expand_as(v) for v in graded]
        grads = torch.autograd.grad(graded, inputs, above, allow_unused=True)
    by_name = {
        name: torch.zeros_like(x) if g is None else g for name, x, g in zip(names, inputs, grads, strict=True)
    }
    first, *more = (v.detach() for v in values)
    return Answer(first, by_name, tuple(more))


def exactly(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the arguments in float64 on the CPU."""
    own = {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    own.pop("inplace_backward", None)
    return cast(own, torch.float64)


def exact(
    loss: Loss, kwargs: Mapping[str, Any], wrt: Sequence[str], upstream: Tensor | None = None
) -> Answer:
    """Evaluate the float64 reference at the exact values of the arguments."""
    return evaluate(loss.reference, exactly(kwargs), wrt, upstream)


def eager_of(loss: Loss, kwargs: Iterable[str]) -> Callable[..., Tensor]:
    """Return the common PyTorch implementation, or the reference where that does not take these arguments."""
    if loss.eager is None:
        return loss.reference
    parameters = inspect.signature(loss.eager).parameters
    return loss.eager if set(kwargs) <= set(parameters) else loss.reference


def eager(
    loss: Loss, kwargs: Mapping[str, Any], wrt: Sequence[str], upstream: Tensor | None = None
) -> Answer:
    """Evaluate plain PyTorch in the arguments' dtype; in float32, then rounded, where it has no such kernel."""
    kwargs = {k: v for k, v in kwargs.items() if k != "inplace_backward"}
    function = eager_of(loss, kwargs)
    try:
        return evaluate(function, kwargs, wrt, upstream)
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
    single = evaluate(function, cast(kwargs, torch.float32), wrt, upstream)
    of_values = next(v.dtype for v in kwargs.values() if is_float(v))
    grads = {name: grad.to(kwargs[name].dtype) for name, grad in single.grads.items()}
    return Answer(single.value.to(of_values), grads, tuple(v.to(of_values) for v in single.more))


# ---- noise ----------------------------------------------------------------------------------------------


def working_precision(loss: Loss, dtype: torch.dtype) -> torch.dtype:
    """Return the type that intermediate results are rounded to."""
    if dtype is torch.float64 or loss.multiplies:
        return dtype
    return torch.float32


# ---- the rule -------------------------------------------------------------------------------------------


def errors_of(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest finite error by quantity."""
    max_error = {}
    for quantity, want in exact.items():
        error = (got[quantity].detach().to(want.device).double() - want).abs()
        finite = error[error.isfinite()]
        max_error[quantity] = finite.max().item() if finite.numel() else 0.0
    return max_error


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of `dtype` at `exact`, never below what a kernel that flushes subnormals can resolve."""
    info = torch.finfo(dtype)
    accumulator = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32)
    smallest = max(info.smallest_normal * info.eps, accumulator.smallest_normal)
    return (exact.abs() * info.eps).clamp_min(smallest)


@dataclass(frozen=True)
class Finding:
    """One quantity of one result, at the element with the largest error relative to the allowed one."""

    quantity: str
    """"value" or "gradient of <argument>"."""
    error: float
    allowed: float
    ratio: float
    """error / allowed; infinite for a wrong dtype, shape, infinity or NaN."""
    relative: float = 0.0
    """Largest error over largest exact magnitude."""
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return f"{self.quantity} {self.message or f'error {self.error:.3g}, allowed {self.allowed:.3g}'}"


def worst_element(got: Tensor, exact: Tensor, absolute: float) -> tuple[float, float, float]:
    """Return (error, allowed, error / allowed) at the element where the last is largest."""
    got = got.detach().to(exact.device)
    if got.numel() == 0:
        return 0.0, 0.0, 0.0
    rounded = exact.to(got.dtype)
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    error = torch.where(same, 0.0, (got.double() - exact).abs().nan_to_num(torch.inf, torch.inf))
    allowed = absolute + ULPS[got.dtype] * ulp(exact, got.dtype)
    ratio = torch.where(rounded.isfinite() | same, error / allowed, torch.inf).nan_to_num(0.0, torch.inf)
    at = int(ratio.argmax())
    return error.flatten()[at].item(), allowed.flatten()[at].item(), ratio.flatten()[at].item()


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest error over the largest magnitude, among the elements where both are finite."""
    got = got.detach().to(exact.device).double()
    finite = got.isfinite() & exact.isfinite()
    if not finite.any():
        return 0.0
    error = (got - exact)[finite].abs().max().item()
    return error / max(exact[finite].abs().max().item(), torch.finfo(torch.float32).smallest_normal)


class Yardstick:
    """The expected results of one call, and the allowed errors.

    Made before the call, which may overwrite its arguments. Eager's error is only computed for results that are off by
    more than the last digit, and noise is only drawn until it allows what eager's error does not.
    """

    def __init__(
        self,
        loss: Loss,
        kwargs: Mapping[str, Any],
        wrt: Sequence[str] | None = None,
        upstream: Tensor | None = None,
    ) -> None:
        self.loss, self.upstream = loss, upstream
        self.wrt = loss.wrt if wrt is None else wrt
        self.kwargs = exactly(kwargs)
        self.dtype = next(v.dtype for v in kwargs.values() if is_float(v))
        self.eager = eager(loss, kwargs, self.wrt, upstream)
        self.exact = evaluate(loss.reference, self.kwargs, self.wrt, upstream)
        self._noise: list[dict[str, float]] = []

    @cached_property
    def errors_of_eager(self) -> dict[str, float]:
        """The error of plain PyTorch by quantity."""
        return errors_of(dict(self.eager.parts()), dict(self.exact.parts()))

    def noise(self) -> Iterator[dict[str, float]]:
        """Yield, after each draw, how far the reference moved by quantity when its operations rounded at random."""
        unit = torch.finfo(working_precision(self.loss, self.dtype)).eps / 2
        drawn = max(unit, MIN_UNIT)
        sides = 2 if self.dtype is torch.float64 else 1  # `exact` is rounded too
        for seed in range(DRAWS):
            if seed == len(self._noise):
                whole, half = (self._rounded(u, seed) for u in (drawn, drawn / 2))
                moved = {q: sides * 2 * d * unit / drawn for q, d in errors_of(whole, half).items()}
                before = self._noise[-1] if self._noise else dict.fromkeys(moved, 0.0)
                self._noise.append({q: max(before[q], d) for q, d in moved.items()})
            yield self._noise[seed]

    def _rounded(self, unit: float, seed: int) -> dict[str, Tensor]:
        with RandomRounding(unit, seed, self._chains()):
            return dict(evaluate(self.loss.reference, self.kwargs, self.wrt, self.upstream).parts())

    def _chains(self) -> tuple[str, ...]:
        """Return the operations that add one term after the other in the working precision."""
        if self.dtype is torch.float64:
            return (*SUMS, *PRODUCTS)
        return tuple(PRODUCTS) if working_precision(self.loss, self.dtype) is torch.float32 else ()

    def allowances(self, quantity: str, rounded_once: bool = False) -> Iterator[float]:
        """Yield increasing allowed errors in addition to the last digits, the cheapest to compute first."""
        allowed = 0.0
        yield allowed
        if not rounded_once:
            yield (allowed := EAGER_FACTOR * self.errors_of_eager[quantity])
        for noise in self.noise():
            yield max(allowed, NOISE_FACTOR * noise[quantity])

    def findings(self, got: Answer, rounded_once: bool = False) -> list[Finding]:
        """Apply the rule to results, quantity by quantity; with `rounded_once` without eager's error.

        Eager rounds half-precision dtypes after each operation, which excuses no error of a loss that rounds once.
        """
        found = []
        for (quantity, have), (_, like), (_, want) in zip(
            got.parts(), self.eager.parts(), self.exact.parts(), strict=True
        ):
            if have.shape != want.shape:
                message = f"has shape {tuple(have.shape)}, should have {tuple(want.shape)}"
                found.append(Finding(quantity, math.inf, math.inf, math.inf, math.inf, message))
                continue
            message = ""
            for allowance in self.allowances(quantity, rounded_once):
                error, allowed, ratio = worst_element(have, want, allowance)
                if ratio <= 1.0 or math.isinf(ratio):
                    break
            if have.dtype != like.dtype:
                ratio, message = math.inf, f"is {name_of(have.dtype)}, should be {name_of(like.dtype)}"
            found.append(Finding(quantity, error, allowed, ratio, relative_error(have, want), message))
        return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
