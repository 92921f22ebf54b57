"""Modules of the functions in `fastloss.losses.linear`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastloss import functional as F
from fastloss.nn._base import LossModule

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyLoss as _Namesake
else:  # torch has it since 2.13
    _Namesake = getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.Module)

__all__ = ["LinearCrossEntropyLoss"]


class LinearCrossEntropyLoss(LossModule, _Namesake):
    """Module of `fastloss.functional.linear_cross_entropy`, a `torch.nn.LinearCrossEntropyLoss` where torch has it.

    Called with hidden states and classes or probabilities, and by keyword the rows' weights. The weight and bias of the
    layer are those of `linear`, a `torch.nn.Linear`; a model's own output layer can be assigned to it.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: torch.nn.LinearCrossEntropyOptions | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        max_extra_bytes: int | None = None,
    ) -> None:
        torch.nn.Module.__init__(self)  # the rest is not left to the namesake, which an older torch lacks
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"weight: expected shape {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(
                f"label_smoothing: expected a number between 0.0 and 1.0, got {label_smoothing}"
            )
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.weight: Tensor | None
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        outputs = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias, device, dtype)
        self.options = options
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.z_loss = z_loss
        self.max_extra_bytes = max_extra_bytes

    def forward(self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        shape = (self.num_classes, *self.out_features)
        linear_weight, linear_bias = self.linear.weight, self.linear.bias
        return F.linear_cross_entropy(
            input,
            linear_weight.reshape(*shape, linear_weight.shape[-1]),
            target,
            linear_bias=None if linear_bias is None else linear_bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
            sample_weight=sample_weight,
            max_extra_bytes=self.max_extra_bytes,
        )

    def extra_repr(self) -> str:
        """Show the layer's sizes, and the options that differ from their defaults."""
        bias = "" if self.linear.bias is None else ", bias=True"
        return f"in_features={self.linear.weight.shape[-1]}, {super().extra_repr()}{bias}"
