"""The description of a loss and the registry, which tests, `check`, `bench` and the README enumerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FAMILIES = (
    "classification",
    "linear",
    "token_statistics",
    "number_token",
    "distillation",
    "elementwise",
    "aggregation",
    "dpo",
    "preference",
    "reward_model",
    "policy",
    "gflownet",
    "returns",
    "advantages",
    "contrastive",
    "supervised_contrastive",
    "retrieval",
    "metric_learning",
    "angular_margin",
    "ctc",
    "survival",
)
"""The families in the order of every table of losses; each is a file of `losses`, of `reference` and of this folder."""


@dataclass
class InputSampler:
    """Reproducible random inputs of one dtype on one device.

    Values are drawn on the CPU in float64 and then converted, so every dtype and device sees the
    same numbers up to rounding; `fast` draws them on the device in the dtype itself.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    seed: int = 0
    fast: bool = False
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device if self.fast else "cpu").manual_seed(self.seed)
        dtype, device = (self.dtype, self.device) if self.fast else (torch.float64, "cpu")
        self._how: dict[str, Any] = {"generator": self.generator, "dtype": dtype, "device": device}

    def _to(self, x: Tensor) -> Tensor:
        return x.to(device=self.device, dtype=self.dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self._to(torch.randn(shape, **self._how) * scale)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        u = torch.rand(shape, **self._how)
        return self._to(low + (high - low) * u)

    def simplex(self, *shape: int, dim: int = 1) -> Tensor:
        x = torch.randn(shape, **self._how)
        return self._to(x.softmax(dim))

    def index(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, **self._how | {"dtype": torch.int64}).to(self.device)


Case = Mapping[str, Any]


@dataclass(frozen=True)
class Loss:
    """One loss and what tests, benchmarks and docs need to know about it.

    `inputs(draw, shape)` gives the required arguments of a call by name. A *case* is a set of further
    arguments; a value that is callable is called with `(draw, shape)` to make a tensor.
    """

    name: str
    family: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[InputSampler, tuple[int, ...]], dict[str, Any]]
    wrt: tuple[str, ...]
    cases: Mapping[str, Any]
    """The further arguments of each case."""
    shapes: tuple[tuple[int, ...], ...]
    bench_shape: tuple[int, ...]
    traffic: Callable[[tuple[int, ...], int, bool], int]
    """Minimal traffic in bytes: `(shape, itemsize, backward)`."""
    replaces: str = ""
    """The function of another library in whose place this one can be called: same arguments, defaults and results."""
    related: str = ""
    """Where the loss is also found, under other arguments or with another result."""
    trained: tuple[str, ...] = ()
    """The part of `wrt` that a training step, and therefore `bench`, differentiates; all of it if empty."""
    products: tuple[int, int] = (0, 0)
    """Minimum number of GEMMs of the loss's shape: forward, forward + backward."""
    eager: Callable[..., Tensor] | None = None
    """The common PyTorch implementation, with the same argument names; None: the reference."""
    unrolls: bool = False
    """Eager and reference are loops over steps, each of which torch.compile would unroll."""

    @property
    def multiplies(self) -> bool:
        """True for a loss that runs GEMMs: in its own buffers, and in the autocast dtype under autocast."""
        return self.products != (0, 0)

    def work(self, shape: tuple[int, ...]) -> int:
        """Return about how many elements eager computes: one for every pair of rows in contrastive losses."""
        return math.prod(shape) * (shape[0] if self.multiplies and len(shape) == 2 else 1)

    def flops(self, shape: tuple[int, ...], backward: bool) -> int:
        """Return the minimum FLOPs of the GEMMs."""
        return 2 * self.work(shape) * self.products[backward]

    def call(self, case: str, draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return all arguments of a call by name."""
        kwargs = self.inputs(draw, shape)
        for key, value in self.cases[case].items():
            kwargs[key] = value(draw, shape) if callable(value) else value
        return kwargs


_losses: dict[str, Loss] = {}
estimators: dict[str, Loss] = {}
"""Functions that are no losses: they return the targets, one tensor or several, of a loss."""


def register_estimator(entry: Loss) -> Loss:
    if entry.name in estimators:
        raise ValueError(f"estimator {entry.name!r} is registered twice")
    estimators[entry.name] = entry
    return entry


def register(loss: Loss) -> Loss:
    if loss.name in _losses:
        raise ValueError(f"loss {loss.name!r} is registered twice")
    _losses[loss.name] = loss
    return loss


def losses(*names: str) -> list[Loss]:
    """Return the registered losses, or those named, in order of registration."""
    unknown = set(names) - set(_losses)
    if unknown:
        raise ValueError(f"no loss named {', '.join(sorted(unknown))}; there are {', '.join(_losses)}")
    return [_losses[n] for n in names] if names else list(_losses.values())


def entries(*names: str) -> list[Loss]:
    """Return losses and estimators, in this order, or those named."""
    everything = {loss.name: loss for loss in losses()} | estimators
    unknown = set(names) - set(everything)
    if unknown:
        raise ValueError(f"no loss named {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    return [everything[n] for n in names] if names else list(everything.values())
