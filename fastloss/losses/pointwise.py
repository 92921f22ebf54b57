"""Pointwise losses: of a prediction and a target, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS
from fastloss._ops.checks import check_floating, check_number, check_real, check_reduction, check_tensors
from fastloss._ops.rowwise import ElementOp
from fastloss._registry import Draw, Loss, register

__all__ = ["sigmoid_focal_loss"]

NO_INDEX = -(2**63)  # the operators take the number of classes for it


def element_reference(formula: Callable[..., Tensor], inputs: int) -> Callable[..., Tensor]:
    """The reference of an `ElementOp` from the loss of one element, `formula(*inputs, *numbers)`."""

    def whole(*args):
        tensors, (weight, norm, reduction, numbers, ignore_index, _, wide) = args[:inputs], args[inputs:]
        shape, first = tensors[0].shape, tensors[0]
        counted = None
        columns = []
        for t in tensors:
            if t.dtype == torch.int64:
                counted = (t != ignore_index).unsqueeze(-1).expand(shape)
                t = (t.unsqueeze(-1) == torch.arange(shape[-1], device=t.device)).to(first.dtype)
            columns.append(t)
        loss = formula(*columns, *numbers)
        if weight is not None:
            loss = torch.where(weight != 0, weight * loss, 0.0)
        elif counted is not None:
            loss = torch.where(counted, loss, 0.0)
        if reduction != REDUCTIONS["none"]:
            loss = loss.mean() if reduction == REDUCTIONS["mean"] else loss.sum()
        if norm is not None:
            loss = loss / norm.reshape(()).to(loss.dtype)
        return loss.float() if wide and loss.dtype in HALF_TYPES else loss

    return whole


def element_op(name: str, formula: Callable[..., Tensor], inputs: int = 2, wrt=(0, 1)) -> ElementOp:
    return ElementOp(name, element_reference(formula, inputs), inputs, wrt)


def is_wide(input: Tensor) -> bool:
    """Under autocast a loss of half types is float32, as torch's are."""
    return input.dtype in HALF_TYPES and torch.is_autocast_enabled(input.device.type)


def promoted(input: Tensor, **others: Tensor | None) -> torch.dtype:
    """The type that torch's operations on all of them give."""
    dtype = input.dtype
    check_real(**others)
    for t in others.values():
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def expanded(name: str, t: Tensor, like: Tensor) -> Tensor:
    try:
        return t.expand(like.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name}: expected a shape that broadcasts to {tuple(like.shape)}, got {tuple(t.shape)}"
        ) from None


_sigmoid_focal_loss = element_op("sigmoid_focal_loss", reference.pointwise.sigmoid_focal_element)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    num_positives: float | Tensor | None = None,
    ignore_index: int = -100,
    background_index: int | None = None,
) -> Tensor:
    r"""Focal loss of independent binary classifications, from logits: RetinaNet's.

    With :math:`p = \sigma(x)` and :math:`p_t = p y + (1 - p)(1 - y)`, the loss of an element is

    .. math:: [\alpha y + (1 - \alpha)(1 - y)]\, (1 - p_t)^\gamma\,
              [-y \log p - (1 - y) \log(1 - p)] .

    Value and gradient are finite and keep their relative precision for all finite logits and any gamma >= 0, in
    every type. :math:`\gamma` = 0, 1/2, 1 and 2 take no power function.

    Args:
        inputs: logits :math:`x` of any shape; float32, float64, bfloat16 or float16, any strides.
        targets: :math:`y` in [0, 1], of the shape of `inputs`, hard or soft; it gets a gradient if it requires one.
            Or classes, int64, of the shape of `inputs` `(..., C)` without its last dimension: :math:`y` is 1 in the
            column of the class and 0 elsewhere.
        alpha: :math:`\alpha` in [0, 1], the weight of y = 1 against y = 0; negative: both weigh 1. Default: 0.25.
        gamma: :math:`\gamma \ge 0`. Default: 2.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is over all elements; with classes it is the sum over
            elements divided by the number of rows that are not ignored. Default: `"none"`.
        weight: factors of a shape that broadcasts to that of `inputs`; elements of weight 0 count nothing whatever
            they hold. Default: 1.
        num_positives: a number, or a tensor without dimensions, that divides the loss; for the mean, in the place
            of the number above. Default: none.
        ignore_index: rows of this class count nothing. Default: -100.
        background_index: rows of this class are negative in every column. Default: C.

    Returns:
        A tensor of the shape of `inputs` for `"none"`, else a scalar; of the type of `inputs` (float32 for half
        types under autocast).

    Raises:
        ValueError, RuntimeError, TypeError, IndexError: for shapes, types and numbers other than these. On CUDA,
            where a look at the classes would wait for the device, a class out of bounds gives NaN instead.

    Source: https://arxiv.org/abs/1708.02002; `torchvision.ops.sigmoid_focal_loss`, classes as in
    `mmcv.ops.sigmoid_focal_loss`, `num_positives` with background -1 and ignored -2 as in apex.
    """
    mode = check_reduction(reduction)
    numbers = [check_number("alpha", alpha, high=1.0), check_number("gamma", gamma, low=0.0)]
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: expected a Tensor, got {type(inputs).__name__}")
    positives = num_positives if isinstance(num_positives, Tensor) else None
    check_tensors(inputs, targets=targets, weight=weight, num_positives=positives)
    check_floating("inputs", inputs)
    by_class = targets.dtype == torch.int64 and inputs.dim() and targets.shape == inputs.shape[:-1]
    if not by_class and targets.shape != inputs.shape:
        raise ValueError(
            f"targets: expected the shape of inputs, {tuple(inputs.shape)}, or classes, int64, of this shape "
            f"without its last dimension; got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    dtype = promoted(inputs, targets=targets, weight=weight)
    inputs = inputs.to(dtype)
    if weight is not None:
        weight = expanded("weight", weight.to(dtype), inputs)
    norm = None
    if by_class:
        background = NO_INDEX if background_index is None else background_index
        if mode == REDUCTIONS["mean"]:
            mode = REDUCTIONS["sum"]
            norm = (targets != ignore_index).sum() if num_positives is None else None
        if weight is not None:
            weight = weight.masked_fill((targets == ignore_index).unsqueeze(-1), 0)
    else:
        if background_index is not None:
            raise ValueError("background_index: expected targets that are classes")
        background = 0
        targets = targets.to(dtype)
    if num_positives is not None:
        mode = REDUCTIONS["sum"] if mode == REDUCTIONS["mean"] else mode
        norm = num_positives
    norm = one_number("num_positives", norm, inputs)
    after = None
    if mode == REDUCTIONS["none"]:
        norm, after = None, norm
    options = (mode, numbers, ignore_index, background, is_wide(inputs))
    try:
        loss = _sigmoid_focal_loss((inputs, targets, weight, norm), options)
        return loss if after is None else (loss / after).to(loss.dtype)
    except RuntimeError as error:
        if "is out of bounds" in str(error):
            raise IndexError(f"targets: {error}") from None
        raise


def one_number(name: str, value: float | Tensor | None, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    high = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        return like.new_full((), check_number(name, value), dtype=high)
    if value.dim():
        raise ValueError(f"{name}: expected one number, got shape {tuple(value.shape)}")
    check_real(**{name: value})
    return value.to(high)


def _binary(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.index(2, *shape).to(draw.dtype)


def _elements(shape: tuple[int, ...], itemsize: int, backward: bool) -> int:
    return (3 if backward else 2) * math.prod(shape) * itemsize


POINTWISE_SHAPES = ((7, 1), (3, 33), (5, 1000), (2, 4099), (2, 5, 3), (2, 17, 3, 5))

register(
    Loss(
        name="sigmoid_focal_loss",
        family="pointwise",
        function=sigmoid_focal_loss,
        reference=reference.sigmoid_focal_loss,
        replaces="torchvision.ops.sigmoid_focal_loss",
        inputs=lambda draw, shape: {
            "inputs": draw.normal(*shape, scale=3.0),
            "targets": _binary(draw, shape),
        },
        wrt=("inputs", "targets"),
        trained=("inputs",),
        forward_arguments=("inputs", "targets", "weight", "num_positives"),
        cases={
            "mean": {"reduction": "mean"},
            "none": {},
            "sum": {"reduction": "sum"},
            "soft": {"targets": lambda d, s: d.uniform(*s), "reduction": "sum"},
            "alpha": {"alpha": 0.75, "gamma": 1.0},
            "gamma=0": {"gamma": 0},
            "gamma=1/2": {"gamma": 0.5, "reduction": "sum"},
            "gamma=3.5": {"alpha": -1, "gamma": 3.5},
            "classes": {"targets": lambda d, s: d.index(s[-1] + 1, *s[:-1]), "reduction": "mean"},
            "background": {
                "targets": lambda d, s: d.index(s[-1] + 2, *s[:-1]) - 2,
                "background_index": -1,
                "ignore_index": -2,
                "reduction": "mean",
                "weight": lambda d, s: d.uniform(*s[:-1], 1, low=0.5, high=2.0),
                "num_positives": lambda d, s: d.uniform(low=1.0, high=3.0),
            },
            "weight": {"weight": lambda d, s: d.index(3, *s[:-1], 1).to(d.dtype), "reduction": "sum"},
        },
        shapes=POINTWISE_SHAPES,
        bench_shape=(1 << 16, 1 << 10),
        traffic=_elements,
    )
)
