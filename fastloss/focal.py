"""Focal loss of a softmax over classes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._checks import check_number, check_reduction, check_rows, check_tensors, check_weight_type
from fastloss._drivers import RowOp
from fastloss._op import HALF_TYPES, REDUCTIONS
from fastloss._registry import Loss, register
from fastloss.token import call_rows, classes_of, is_wide, some_ignored

__all__ = ["softmax_focal_loss"]


def _reference(
    input, target, weight, row_weight, ignore_index, reduction, logit_scale, softcap, numbers, wide
):
    loss = reference.softmax_focal_loss(
        input, target, numbers[0], weight, ignore_index, list(REDUCTIONS)[reduction]
    )
    return loss.float() if wide and loss.dtype in HALF_TYPES else loss


_focal = RowOp("softmax_focal_loss", _reference, saved=2)


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    background_class: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Softmax focal loss: cross-entropy that down-weights samples whose target is already probable.

    .. math:: -\alpha_y (1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(x)

    in one read of the logits; its gradient is :math:`A (p_j - [j = y])` with
    :math:`A = \alpha_y \left[(1 - p)^\gamma - \gamma (1 - p)^{\gamma - 1} p \log p\right]`. Both are finite and keep
    their relative precision for any `gamma` in [0, 5], also below 1, and for certain classes.

    Args:
        input: logits `(C)`, `(N, C)` or `(N, C, d1, ...)`; float32, float64, bfloat16 or float16, any strides.
        target: classes, int64 (or uint8), of the input's shape without `C`.
        gamma: :math:`\gamma \ge 0`; 0 gives cross-entropy. Default: 2.
        alpha: :math:`\alpha`: a number for all classes, or `(C)`, one for each. Default: 1.
        ignore_index: rows with this class count nothing and have no gradient. Default: -100.
        reduction: `"none"`, `"sum"` or `"mean"`: over the rows that are not ignored, whatever their `alpha`.
        background_class: with a number `alpha`, this class weighs 1 - `alpha` (0 in kornia). Default: none.
        inplace_backward: write the gradient into the memory of `input` during backward: no extra memory, the
            logits are lost, a second backward raises. Default: False.

    Returns:
        A scalar, or for `"none"` a tensor of the input's shape without `C`, of the input's type (float32 for half
        types under autocast).

    Raises:
        ValueError, RuntimeError, IndexError: as for `cross_entropy`. On CUDA a class out of bounds gives NaN.

    Source: Lin et al., https://arxiv.org/abs/1708.02002, in the form for softmax of kornia's `focal_loss`.
    """
    mode = check_reduction(reduction)
    check_rows(input, target, None, ignore_index)
    classes = input.shape[0 if input.dim() == 1 else 1]
    if target.is_floating_point():
        raise RuntimeError("target: expected classes of type int64 or uint8, got probabilities")
    if isinstance(alpha, Tensor):
        check_tensors(input, alpha=alpha)
        check_weight_type("alpha", alpha, input)
        if alpha.shape != (classes,):
            raise RuntimeError(f"alpha: expected one number for each of {classes} classes, got {alpha.shape}")
    elif alpha is not None:
        check_number("alpha", alpha)
    if background_class is not None and (alpha is None or isinstance(alpha, Tensor)):
        raise ValueError("background_class: needs a number as alpha")
    if background_class is not None and not 0 <= background_class < classes:
        raise ValueError(f"background_class: expected a class below {classes}, got {background_class}")
    options = (ignore_index, mode, 1.0, 0.0, [check_number("gamma", gamma, low=0.0)], is_wide(input))
    weight = reference.focal.class_weights(alpha, background_class, input)
    target = target.long() if target.dtype == torch.uint8 else target
    target = target.reshape(()) if input.dim() == 1 else target
    return call_rows(_focal, (input, target, weight, None), options, inplace_backward)


def _eager(input, target, gamma=2.0, alpha=None, ignore_index=-100, reduction="mean"):
    """What people write today."""
    nll = F.cross_entropy(input, target, ignore_index=ignore_index, reduction="none")
    loss = (1 - torch.exp(-nll)) ** gamma * nll
    if isinstance(alpha, Tensor):
        if alpha.shape != (input.shape[min(input.dim() - 1, 1)],):
            raise RuntimeError("alpha: expected one number for each class")
        loss = alpha[torch.where(target == ignore_index, 0, target)] * loss
    elif alpha is not None:
        loss = alpha * loss
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum()


register(
    Loss(
        name="softmax_focal_loss",
        family="token",
        function=softmax_focal_loss,
        reference=reference.softmax_focal_loss,
        eager=_eager,
        inputs=lambda draw, shape: {
            "input": draw.normal(*shape, scale=3.0),
            "target": classes_of(draw, shape),
        },
        wrt=("input",),
        forward_arguments=("input", "target"),
        cases={
            "plain": {},
            "half power": {"gamma": 0.5, "reduction": "sum", "target": some_ignored},
            "classes": {
                "gamma": 1.7,
                "alpha": lambda d, s: d.uniform(s[1], low=0.5, high=2.0),
                "target": some_ignored,
            },
            "background": {"alpha": 0.25, "background_class": 0, "reduction": "none"},
        },
        shapes=((7, 1), (3, 33), (3, 1030), (2, 17, 3, 5)),
        bench_shape=(65536, 1000),
        traffic=lambda shape, itemsize, backward: (2 if backward else 1) * math.prod(shape) * itemsize,
    )
)
