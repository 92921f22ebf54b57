"""The losses as modules, generated from the registry: `CrossEntropyLoss` for `cross_entropy`, and so on.

A module takes the options of its function in the constructor (tensors become buffers) and the other arguments, such as
`input` and `target`, in the call. An option given by name in a call, such as a learned temperature, overrides that of
the constructor for this call.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastloss._registry import Loss, losses


class LossModule(torch.nn.Module):
    """Base class of the modules; `loss` is the registry's entry."""

    loss: Loss
    __signature__: ClassVar[inspect.Signature]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        bound = type(self).__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        options = {name: getattr(self, name) for name in type(self).__signature__.parameters}
        return self.loss.function(**dict(zip(self.loss.forward_arguments, args)), **(options | kwargs))

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in type(self).__signature__.parameters}
        defaults = {name: p.default for name, p in type(self).__signature__.parameters.items()}
        changed = {n: v for n, v in options.items() if isinstance(v, Tensor) or v != defaults[n]}
        return ", ".join(
            f"{n}={tuple(v.shape) if isinstance(v, Tensor) else v!r}" for n, v in changed.items()
        )


def _module(loss: Loss) -> type[LossModule]:
    parameters = inspect.signature(loss.function).parameters.values()
    options = [p for p in parameters if p.name not in loss.forward_arguments]
    name = "".join(part.capitalize() for part in loss.name.split("_"))
    name += "" if name.endswith("Loss") else "Loss"
    called = ", ".join(loss.forward_arguments)
    doc = f"`fastloss.functional.{loss.name}` as a module, called with `{called}`.\n\n{inspect.getdoc(loss.function)}"
    return type(name, (LossModule,), {
        "__doc__": doc, "__module__": __name__, "loss": loss, "__signature__": inspect.Signature(options),
    })  # fmt: skip


for _loss in losses():
    _class = _module(_loss)
    globals()[_class.__name__] = _class
__all__ = sorted(n for n, v in globals().items() if isinstance(v, type) and issubclass(v, LossModule))
