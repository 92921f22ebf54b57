"""Every registered loss and estimator against its float64 reference: the rule, and the command that applies it.

The rule, for the value and for the gradient of every differentiable argument, element by element:

    |got - exact| <= EAGER_FACTOR * max |eager - exact| + ULPS[dtype] * ulp(exact) + cancelled

`exact` is the reference in float64 on the very inputs that the loss was given; a result equal to `exact`
rounded to the dtype has no error. `eager` is plain PyTorch in the dtype under test, so its worst element is
the error that users have today: the reference or, where that is closer, the function that the loss
replaces. For float64 itself, where the reference is `exact`, the float32 error is taken and scaled by the
ratio of the two epsilons, and counts once more, since `exact` is then no nearer to the truth than that.
Eager's error on one input may be small by luck, most of all where it is that of a single number: a
comparison that fails is judged again by eager's largest error on DRAWS inputs of that case, shape and dtype.
`cancelled` is for gradients, the terms of which may cancel, down to nothing for a single class, and leave the
rounding of the type that they are summed in: half an epsilon of float32 (float64 for float64) times the
largest upstream gradient.

Where `exact`, rounded to the dtype, is infinite or NaN, the loss must be so too. The dtype and shape must be
the reference's. The upstream gradient is not one, so that a loss which forgets it is caught.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastloss._registry import InputSampler, Loss, entries

EAGER_FACTOR = 2.0
ULPS = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Half types are computed in float32 and rounded at the end, which costs half a unit."""
DRAWS = 5
"""How many inputs eager's error is taken from where one does not tell."""
DTYPES = tuple(ULPS)


@dataclass(frozen=True)
class Result:
    """The worst element of one comparison, relative to what is allowed there."""

    loss: str
    case: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    quantity: str
    """"value" or "gradient of <argument>"."""
    error: float
    allowed: float
    ratio: float
    """error / allowed at the worst element; infinite for a wrong dtype, shape, infinity or NaN."""
    relative: float = 0.0
    """Largest error over largest exact magnitude, the worst of all quantities."""
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "()"
        text = f"{self.loss} {self.case} {shape} {name_of(self.dtype)} {self.device}: {self.quantity}"
        return f"{text} {self.message or f'error {self.error:.3g}, allowed {self.allowed:.3g}'}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def devices() -> list[str]:
    """The devices present on this machine."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def cast(kwargs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with every floating-point tensor converted to `dtype`."""
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()
    }


def differentiable(kwargs: Mapping[str, Any], wrt: Sequence[str]) -> list[str]:
    """Those of `wrt` that are floating-point tensors in this call."""
    return [k for k in wrt if isinstance(kwargs.get(k), Tensor) and kwargs[k].is_floating_point()]


def upstream(value: Tensor) -> Tensor:
    """A fixed gradient for `value`: multiples of 1/64 in [0.5, 1.5], exact in every dtype."""
    steps = torch.randint(32, 97, value.shape, generator=torch.Generator().manual_seed(1))
    return (steps / 64).to(value)


def values_by_name(result: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"value": result}
    return {f"value {i + 1}": v for i, v in enumerate(result)}


def evaluate(
    function: Callable[..., Tensor], kwargs: Mapping[str, Any], wrt: Sequence[str]
) -> dict[str, Tensor]:
    """The value (of several: each) and the gradients with respect to the arguments `wrt`, by quantity."""
    names = differentiable(kwargs, wrt)
    leaves = {k: kwargs[k].detach().requires_grad_() for k in names}
    found = values_by_name(function(**{**kwargs, **leaves}))
    graded = [v for v in found.values() if v.requires_grad]
    found = {name: v.detach() for name, v in found.items()}
    if graded:
        ups = [upstream(v) for v in graded]
        grads = torch.autograd.grad(graded, list(leaves.values()), ups, allow_unused=True)
    else:
        grads = (None,) * len(names)
    for k, grad in zip(names, grads, strict=True):
        found[f"gradient of {k}"] = torch.zeros_like(leaves[k]) if grad is None else grad
    return found


def eager_of(loss: Loss, kwargs: Iterable[str]) -> Callable[..., Tensor]:
    """What people call today, or the reference where that does not take these arguments."""
    if loss.eager is None:
        return loss.reference
    parameters = inspect.signature(loss.eager).parameters
    return loss.eager if set(kwargs) <= set(parameters) else loss.reference


def evaluate_eager(
    function: Callable[..., Tensor], kwargs: Mapping[str, Any], loss: Loss
) -> dict[str, Tensor]:
    """In the dtype of `kwargs`; in float32, then rounded, where PyTorch lacks a kernel for that dtype."""
    try:
        return evaluate(function, kwargs, loss.wrt)
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
    single = evaluate(function, cast(kwargs, torch.float32), loss.wrt)
    dtypes = {f"gradient of {k}": v.dtype for k, v in kwargs.items() if isinstance(v, Tensor)}
    of_values = next(v.dtype for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point())
    return {k: v.to(dtypes.get(k, of_values)) for k, v in single.items()}


def errors_of(eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest finite error by quantity."""
    worst = {}
    for quantity, want in exact.items():
        error = (eager[quantity].double() - want).abs()
        finite = error[error.isfinite()]
        worst[quantity] = finite.max().item() if finite.numel() else 0.0
    return worst


def errors_of_eager(
    loss: Loss, kwargs: Mapping[str, Any], reference: Mapping[str, Tensor]
) -> dict[str, float]:
    """By quantity, the smaller of the errors of the reference, evaluated already, and of what it replaces."""
    exact = evaluate(loss.reference, cast(kwargs, torch.float64), loss.wrt)
    errors = errors_of(reference, exact)
    function = eager_of(loss, kwargs)
    if function is loss.reference:
        return errors
    theirs = errors_of(evaluate_eager(function, kwargs, loss), exact)
    return {k: min(e, theirs[k]) for k, e in errors.items()}


def eager_scale(
    loss: Loss, kwargs: Mapping[str, Any], dtype: torch.dtype, reference: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """By quantity, what counts as eager's error in `dtype`; `reference` if that is evaluated already."""
    if dtype is not torch.float64:
        return errors_of_eager(loss, kwargs, reference or evaluate_eager(loss.reference, kwargs, loss))
    single = cast(kwargs, torch.float32)
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    errors = errors_of_eager(loss, single, evaluate(loss.reference, single, loss.wrt))
    return {k: scale * e * (1 + 1 / EAGER_FACTOR) for k, e in errors.items()}


def accumulator(dtype: torch.dtype) -> torch.finfo:
    """Of the type in which sums are done for `dtype`."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32)


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at `exact`, never below what a kernel that flushes subnormals can resolve."""
    info = torch.finfo(dtype)
    least = max(info.smallest_normal * info.eps, accumulator(dtype).smallest_normal)
    return (exact.abs() * info.eps).clamp_min(least)


def worst_element(got: Tensor, exact: Tensor, absolute: float) -> tuple[float, float, float]:
    """(error, allowed, error / allowed) at the element where the last is largest."""
    got = got.detach()
    if got.numel() == 0:
        return 0.0, 0.0, 0.0
    rounded, wide = exact.to(got.dtype), got.double()
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    error = torch.where(same, 0.0, (wide - exact).abs().nan_to_num(torch.inf, torch.inf))
    allowed = absolute + ULPS[got.dtype] * ulp(exact, got.dtype)
    ratio = torch.where(rounded.isfinite() | same, error / allowed, torch.inf).nan_to_num(0.0, torch.inf)
    at = int(ratio.argmax())
    return error.flatten()[at].item(), allowed.flatten()[at].item(), ratio.flatten()[at].item()


def compare_call(
    loss: Loss,
    kwargs: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    function: Callable[..., Tensor] | None = None,
    case: str = "",
    shape: tuple[int, ...] = (),
    at_least: Mapping[str, float] | None = None,
) -> Result:
    """Compare one call of `function` (the loss's own by default) with the float64 reference.

    `function` is called last, so it may overwrite its arguments (`inplace_backward=True`). `at_least` is what
    eager's errors, by quantity, are known to reach on other inputs.
    """
    exact = evaluate(loss.reference, cast(kwargs, torch.float64), loss.wrt)
    eager = evaluate_eager(loss.reference, kwargs, loss)
    errors = eager_scale(loss, kwargs, dtype, eager)
    if at_least:
        errors = {k: max(e, at_least[k]) for k, e in errors.items()}
    device = next((v.device.type for v in kwargs.values() if isinstance(v, Tensor)), "cpu")
    got = evaluate(function or loss.function, kwargs, loss.wrt)

    values = [v for k, v in exact.items() if k.startswith("value")]
    largest = max((u for v in values for u in upstream(v).abs().flatten().tolist()), default=0.0)
    cancelled = accumulator(dtype).eps / 2 * largest
    if loss.multiplies and dtype is torch.float64:
        cancelled *= 2  # the reference's own sums of products are rounded just so

    where = (loss.name, case, shape, dtype, device)
    found = []
    for quantity, want in exact.items():
        have, like = got[quantity], eager[quantity]
        message = ""
        if have.shape != like.shape:
            message = f"has shape {tuple(have.shape)}, should have {tuple(like.shape)}"
            found.append(Result(*where, quantity, *([torch.inf] * 4), message))
            continue
        absolute = EAGER_FACTOR * errors[quantity] + (0.0 if quantity.startswith("value") else cancelled)
        error, allowed, ratio = worst_element(have, want, absolute)
        if have.dtype != like.dtype:
            ratio, message = torch.inf, f"is {name_of(have.dtype)}, should be {name_of(like.dtype)}"
        relative = relative_error(have, want)
        found.append(Result(*where, quantity, error, allowed, ratio, relative, message))
    return replace(max(found, key=lambda r: r.ratio), relative=max(r.relative for r in found))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest error over largest magnitude, among the elements where both are finite."""
    got, want = got.double(), want.double()
    finite = got.isfinite() & want.isfinite()
    if not finite.any():
        return 0.0
    error = (got - want)[finite].abs().max().item()
    return error / max(want[finite].abs().max().item(), torch.finfo(torch.float32).smallest_normal)


def compare(
    loss: Loss | str,
    case: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    function: Callable[..., Tensor] | None = None,
) -> Result:
    """InputSampler the inputs of one case and compare the loss with its float64 reference."""
    if isinstance(loss, str):
        (loss,) = entries(loss)

    def drawn(seed: int) -> dict[str, Any]:
        return loss.call(case, InputSampler(dtype, device, seed), shape)

    names: dict[str, Any] = {"function": function, "case": case, "shape": shape}
    result = compare_call(loss, drawn(seed), dtype, **names)
    if result.ok or result.message or result.ratio == torch.inf:
        return result
    draws = [eager_scale(loss, drawn(s), dtype) for s in range(seed + 1, seed + DRAWS)]
    worst = {k: max(errors[k] for errors in draws) for k in draws[0]}
    return compare_call(loss, drawn(seed), dtype, **names, at_least=worst)


def run_all(names: Sequence[str], on: Sequence[str]) -> Iterator[Result | int]:
    """First the number of comparisons, then the result of each."""
    plan = [
        (loss, case, shape, dtype, device)
        for loss in entries(*names)
        for device in on
        for dtype in DTYPES
        for case in loss.cases
        for shape in loss.shapes
    ]
    yield len(plan)
    for loss, case, shape, dtype, device in plan:
        try:
            yield compare(loss, case, shape, dtype, device)
        except Exception as error:  # whatever a loss raises is its failure, and the others still run
            message = f"raised {type(error).__name__}: {error}"
            yield Result(
                loss.name, case, shape, dtype, device, "call", torch.inf, 0.0, torch.inf, torch.inf, message
            )


def main(args: argparse.Namespace) -> int:
    """`python -m fastloss check`: a table, the failures, and 1 if there are any."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    runs = run_all(args.loss or (), args.device or devices())
    total = next(runs)
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in track(runs, "checking", total, console=console, transient=True):
        groups.setdefault((result.loss, result.device, name_of(result.dtype)), []).append(result)
        if args.verbose:
            console.print(f"{'ok  ' if result.ok else 'FAIL'} {result}", highlight=False, soft_wrap=True)

    table = Table(box=None, header_style="bold")
    for column in ("loss", "device", "dtype"):
        table.add_column(column)
    for column in ("comparisons", "worst error", "allowed", "error / allowed", "failed"):
        table.add_column(column, justify="right")
    for key, results in groups.items():
        worst = max(results, key=lambda r: r.ratio)
        failed = sum(not r.ok for r in results)
        numbers = f"{worst.error:.2g}", f"{worst.allowed:.2g}", f"{worst.ratio:.3g}"
        table.add_row(*key, str(len(results)), *numbers, str(failed), style="red" if failed else "")
    console.print(table)

    failures = [r for results in groups.values() for r in results if not r.ok]
    for result in failures:
        console.print(f"FAIL {result}", style="red", highlight=False, soft_wrap=True)
    console.print(f"{total - len(failures)} of {total} comparisons are no worse than eager PyTorch.")
    return 1 if failures else 0
