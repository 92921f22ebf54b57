"""Token classification: losses of rows of logits with a class, or a distribution over classes, as target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES
from fastloss._ops.checks import (
    check_integer,
    check_number,
    check_reduction,
    check_row_weight,
    check_rows,
    check_tensors,
    check_weight,
    legacy_reduction,
    promoted,
    real_number,
    rows_shape,
)
from fastloss._ops.dtypes import autocast_to_fp32
from fastloss._ops.rowwise import RowOp

__all__ = ["cross_entropy", "poly1_cross_entropy", "softmax_focal_loss"]


cross_entropy_rows = RowOp("cross_entropy", reference.cross_entropy)


def _as_classes(input: Tensor, target: Tensor) -> Tensor:
    """Return a target of classes as int64, that of a single row as a scalar; refuse probabilities."""
    if target.is_floating_point():
        raise RuntimeError("target: expected classes of type int64 or uint8, got probabilities")
    target = target.long() if target.dtype == torch.uint8 else target
    return target.reshape(()) if input.dim() == 1 else target


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the cross-entropy between logits and classes or class probabilities, in one read of the logits.

    With :math:`z = c \tanh(s x / c)` (scale `s`, softcap `c`; without softcap :math:`z = s x`) and
    :math:`\mathrm{lse} = \log \sum_c e^{z_c}`, the loss of a row with class :math:`y` is

    .. math:: w_y \left[(1 - \varepsilon)(\mathrm{lse} - z_y) + \zeta\, \mathrm{lse}^2\right]
              + \frac{\varepsilon}{C} \sum_c w_c (\mathrm{lse} - z_c)

    and with probabilities :math:`q`

    .. math:: \sum_c w_c \left[(1 - \varepsilon) q_c + \tfrac{\varepsilon}{C}\right] (\mathrm{lse} - z_c)
              + \zeta\, \mathrm{lse}^2 .

    The gradient is written while the row is in cache; no softmax is stored. The loss of a row keeps its relative
    precision however far the target wins, and does not depend on the other rows or on the number of threads.

    Args:
        input: logits `(C)`, `(N, C)` or `(N, C, d1, ...)`; float32, float64, bfloat16 or float16, any strides.
        target: classes, int64 (or uint8), of the input's shape without `C`; or probabilities of its full shape.
        weight: `(C)`, a weight :math:`w` for each class. Default: 1.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this class are ignored and have no gradient. Default: -100.
        reduction: `"none"`, `"sum"` or `"mean"`: the sum over rows divided by the sum of :math:`w_y` times
            `sample_weight` over the rows that are not ignored (with probabilities: of `sample_weight`).
        label_smoothing: :math:`\varepsilon` in [0, 1]. Default: 0.
        logit_scale: :math:`s`, multiplies the logits. Default: 1.
        softcap: :math:`c > 0`, bounds the logits (Gemma 2). Default: none.
        z_loss: :math:`\zeta`, draws lse towards 0 (PaLM, ST-MoE). Default: 0.
        sample_weight: a weight for each row, of the shape of the classes. Default: 1.
        inplace_backward: write the gradient into the memory of `input` during backward: no extra memory, the
            logits are lost, a second backward raises. Default: False.

    Returns:
        A scalar, or for `"none"` a tensor of the input's shape without `C`, of the input's type (float32 for
        half-precision dtypes under autocast).

    Raises:
        ValueError, RuntimeError, IndexError: for the arguments for which torch raises them. On CUDA, where a
            look at the targets would wait for the device, a class out of bounds gives NaN instead.

    Source: `torch.nn.functional.cross_entropy`; softcap https://arxiv.org/abs/2408.00118, z-loss
    https://arxiv.org/abs/2204.02311.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce, reduction)
    mode = check_reduction(reduction)
    weight, ignore_index = check_rows(input, target, weight, ignore_index)
    if sample_weight is not None:
        check_tensors(input, sample_weight=sample_weight)
        sample_weight = check_row_weight(sample_weight, input, rows_shape(input))
    if type(label_smoothing) is not float:
        label_smoothing = real_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing: expected a number between 0.0 and 1.0, got {label_smoothing}")
    cap = 0.0 if softcap is None else check_number("softcap", softcap, low=math.ulp(0.0))
    if target.dtype == torch.uint8:
        target = target.long()
    elif target.is_floating_point():
        wider = promoted(input, target=target, weight=None if input.dtype in HALF_TYPES else weight)
        if wider != input.dtype or wider != target.dtype:
            input, target = input.to(wider), target.to(wider)
    elif input.dim() == 1 and not target.is_floating_point():
        target = target.reshape(())
    hparams = cross_entropy_rows.pack(label_smoothing=label_smoothing, z_loss=check_number("z_loss", z_loss))
    scale = check_number("logit_scale", logit_scale)
    options = (ignore_index, mode, scale, cap, hparams, autocast_to_fp32(input))
    return cross_entropy_rows((input, target, weight, sample_weight), options, inplace_backward)


def _focal_reference(input, target, gamma, weight, ignore_index, reduction, **_):
    return reference.softmax_focal_loss(input, target, gamma, weight, ignore_index, reduction)


_focal = RowOp("softmax_focal_loss", _focal_reference)


def _class_weights(
    alpha: float | Tensor | None, background_class: int | None, input: Tensor
) -> Tensor | None:
    """Return the weight of each class that `alpha` stands for."""
    if alpha is None or isinstance(alpha, Tensor):
        return alpha
    classes = input.shape[min(input.dim() - 1, 1)]
    weight = torch.full((classes,), alpha, dtype=input.dtype, device=input.device)
    if background_class is not None:
        background = torch.arange(classes, device=input.device) == background_class
        weight = weight.masked_fill(background, 1 - alpha)
    return weight


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
    r"""Compute the softmax focal loss: cross-entropy that down-weights samples whose target is already probable.

    .. math:: -\alpha_y (1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(x)

    in one read of the logits; its gradient is :math:`A (p_j - [j = y])` with
    :math:`A = \alpha_y \left[(1 - p)^\gamma - \gamma (1 - p)^{\gamma - 1} p \log p\right]`. Both are finite and keep
    their relative precision for any `gamma` in [0, 5], also below 1, and for certain classes.

    Args:
        input: logits `(C)`, `(N, C)` or `(N, C, d1, ...)`; float32, float64, bfloat16 or float16, any strides.
        target: classes, int64 (or uint8), of the input's shape without `C`.
        gamma: :math:`\gamma \ge 0`; 0 gives cross-entropy. Default: 2.
        alpha: :math:`\alpha`: a number for all classes, or `(C)`, one for each. Default: 1.
        ignore_index: rows with this class are ignored and have no gradient. Default: -100.
        reduction: `"none"`, `"sum"` or `"mean"`: over the rows that are not ignored, whatever their `alpha`.
        background_class: with a number `alpha`, this class weighs 1 - `alpha` (0 in kornia). Default: none.
        inplace_backward: write the gradient into the memory of `input` during backward: no extra memory, the
            logits are lost, a second backward raises. Default: False.

    Returns:
        A scalar, or for `"none"` a tensor of the input's shape without `C`, of the input's type (float32 for
        half-precision dtypes under autocast).

    Raises:
        ValueError, RuntimeError, IndexError: as for `cross_entropy`. On CUDA a class out of bounds gives NaN.

    Source: Lin et al., https://arxiv.org/abs/1708.02002, in the form for softmax of kornia's `focal_loss`.
    """
    mode = check_reduction(reduction)
    _, ignore_index = check_rows(input, target, None, ignore_index)
    classes = input.shape[0 if input.dim() == 1 else 1]
    target = _as_classes(input, target)
    if isinstance(alpha, Tensor) and alpha.dim():
        check_tensors(input, alpha=alpha)
        alpha = check_weight("alpha", alpha, input)
        if alpha.shape != (classes,):
            raise RuntimeError(f"alpha: expected one number for each of {classes} classes, got {alpha.shape}")
    elif alpha is not None:
        alpha = check_number("alpha", alpha)
    if background_class is not None and (alpha is None or isinstance(alpha, Tensor)):
        raise ValueError("background_class: needs a number as alpha")
    if background_class is not None:
        background_class = check_integer("background_class", background_class)
        if not 0 <= background_class < classes:
            raise ValueError(f"background_class: expected a class below {classes}, got {background_class}")
    hparams = _focal.pack(gamma=check_number("gamma", gamma, low=0.0))
    options = (ignore_index, mode, 1.0, 0.0, hparams, autocast_to_fp32(input))
    weight = _class_weights(alpha, background_class, input)
    return _focal((input, target, weight, None), options, inplace_backward)


def _poly1_reference(input, target, weight, ignore_index, reduction, epsilon, **_):
    return reference.poly1_cross_entropy(input, target, weight, ignore_index, reduction, epsilon)


_poly1 = RowOp("poly1_cross_entropy", _poly1_reference)


def poly1_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    epsilon: float = 1.0,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the poly-1 cross-entropy (PolyLoss): cross-entropy + :math:`\epsilon (1 - p_y)`.

    .. math:: w_y \left[-\log p_y + \epsilon (1 - p_y)\right], \qquad p = \mathrm{softmax}(x)

    in one read of the logits; its gradient is :math:`w_y (1 + \epsilon p_y)(p_j - [j = y])`. Both keep their relative
    precision for certain classes, for :math:`\epsilon = -1` too, where the terms nearly cancel.

    Args:
        input: logits `(C)`, `(N, C)` or `(N, C, d1, ...)`; float32, float64, bfloat16 or float16, any strides.
        target: classes, int64 (or uint8), of the input's shape without `C`.
        weight: `(C)`, a weight :math:`w` for each class, of both terms. Default: 1.
        ignore_index: rows with this class are ignored and have no gradient. Default: -100.
        reduction: `"none"`, `"sum"` or `"mean"`: the sum over rows divided by the sum of :math:`w_y` over the rows
            that are not ignored.
        epsilon: :math:`\epsilon`, a finite number; 0 gives cross-entropy, and below -1 the loss falls where a class
            becomes less probable. Default: 1.
        inplace_backward: write the gradient into the memory of `input` during backward: no extra memory, the
            logits are lost, a second backward raises. Default: False.

    Returns:
        A scalar, or for `"none"` a tensor of the input's shape without `C`, of the input's type (float32 for
        half-precision dtypes under autocast).

    Raises:
        ValueError, RuntimeError, IndexError: as for `cross_entropy`. On CUDA a class out of bounds gives NaN.

    Source: Leng et al., https://arxiv.org/abs/2204.12511.
    """
    mode = check_reduction(reduction)
    weight, ignore_index = check_rows(input, target, weight, ignore_index)
    target = _as_classes(input, target)
    hparams = _poly1.pack(epsilon=check_number("epsilon", epsilon))
    options = (ignore_index, mode, 1.0, 0.0, hparams, autocast_to_fp32(input))
    return _poly1((input, target, weight, None), options, inplace_backward)
