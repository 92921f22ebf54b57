"""The base class of the modules: how options are kept and shown."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter


class LossModule(torch.nn.Module):
    """Base of the modules, whose options are attributes with the names of the constructor's parameters.

    An option that is a tensor is a buffer and one that is a `Parameter` a parameter, whether it is given to the
    constructor or set later: it moves with the module, stands in its state, and a parameter is trained.
    """

    _defaults: ClassVar[dict[str, Any]] = {}
    """The options and their defaults, those of base classes included."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _, *options = inspect.signature(cls.__init__).parameters.values()
        cls._defaults = cls._defaults | {option.name: option.default for option in options}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a tensor for an option that held none is registered, which torch does for a Parameter."""
        is_tensor = isinstance(value, Tensor) and not isinstance(value, Parameter)
        if (
            is_tensor
            and name in self._defaults
            and name not in self._buffers
            and self._parameters.get(name) is None
        ):
            self.__dict__.pop(name, None)
            self._parameters.pop(name, None)
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Show the options that differ from their defaults; of tensors the shape."""
        shown = []
        for name, default in self._defaults.items():
            value = getattr(self, name, default)
            if isinstance(value, Tensor):
                shown.append(f"{name}={type(value).__name__}{tuple(value.shape)}")
            elif value != default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)
