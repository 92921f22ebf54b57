"""Losses of a prediction and a target, and of scores of two classes, as in torch.nn.functional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import REDUCTIONS
from fastloss._ops.checks import (
    broadcast,
    call_with_classes,
    check_floating,
    check_integer,
    check_number,
    check_real,
    check_reduction,
    check_tensor,
    check_tensors,
    expanded,
    legacy_reduction,
    one_number,
    promoted,
    real_number,
    values_visible,
    warn,
)
from fastloss._ops.dtypes import accumulation_dtype, autocast_to_fp32
from fastloss._ops.elementwise import NO_INDEX, ElementOp

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "hinge_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "log_cosh_loss",
    "mse_loss",
    "rmse_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]


_formulas = reference.elementwise
_mse_loss = ElementOp("mse_loss", _formulas.squared_error)
_l1_loss = ElementOp("l1_loss", _formulas.absolute_error)
_smooth_l1_loss = ElementOp("smooth_l1_loss", _formulas.smooth_absolute_error)
_huber_loss = ElementOp("huber_loss", _formulas.huber)
_log_cosh_loss = ElementOp("log_cosh_loss", _formulas.log_cosh)
_hinge_loss = ElementOp("hinge_loss", _formulas.hinge)
_kl_div = ElementOp("kl_div", _formulas.kl_divergence)
_binary_cross_entropy = ElementOp("binary_cross_entropy", _formulas.binary, harmless=0.5)
_binary = ElementOp("binary_cross_entropy_with_logits", _formulas.binary_with_logits)
_weighted_binary = ElementOp(
    "weighted_binary_cross_entropy_with_logits", _formulas.weighted_binary_with_logits
)


def _together(
    op: ElementOp,
    input: Tensor,
    target: Tensor,
    reduction: str,
    hparams: list[float] | None = None,
    weight: Tensor | None = None,
    by_weight: bool = False,
    pos_weight: Tensor | None = None,
    wide: bool = False,
    warns: bool = True,
    integers: Sequence[str] = (),
) -> Tensor:
    """Check, broadcast and call; with `by_weight` a mean divides by the sum of the weights.

    `integers` names those of `input` and `target` that may be integers, beside one in floating point.
    """
    mode = check_reduction(reduction)
    check_tensors(input, target=target, weight=weight, pos_weight=pos_weight)
    check_real(weight=weight, pos_weight=pos_weight)
    dtype = promoted(input, target=target, weight=weight if by_weight else None)
    for name, t in (("input", input), ("target", target)):
        if not t.is_floating_point() and not (name in integers and dtype.is_floating_point):
            check_floating(name, t)
    x, y = broadcast(input, target, warns)
    norm = None
    if weight is not None:
        weight = expanded("weight", weight.to(dtype), x)
        if by_weight and mode == REDUCTIONS["mean"]:
            mode = REDUCTIONS["sum"]
            norm = weight.sum(dtype=accumulation_dtype(dtype))
    inputs = [x.to(dtype), y.to(dtype)]
    if pos_weight is not None:
        inputs.append(expanded("pos_weight", pos_weight.to(dtype), x))
    hparams = op.pack() if hparams is None else hparams
    return op((*inputs, weight, norm), (mode, hparams, -1, -1, wide or autocast_to_fp32(inputs[0])))


BOTH = ("input", "target")


def _check_no_flags(input: Tensor, target: Tensor) -> None:
    """Refuse booleans, which torch does not subtract."""
    check_tensors(input, target=target)
    for name, t in (("input", input), ("target", target)):
        if t.dtype == torch.bool:
            check_floating(name, t)


def _check_weight(weight: Tensor | None, input: Tensor, target: Tensor) -> None:
    check_tensors(input, target=target, weight=weight)
    if weight is not None and weight.shape != input.shape:
        broadcast(input, target, True)
        raise ValueError(
            f"weight: expected the shape of input, {tuple(input.shape)}, got {tuple(weight.shape)}"
        )


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the squared error :math:`\ell = (x - y)^2`; value and gradients in one read.

    Args:
        input: predictions :math:`x` of any shape and floating point type, any strides.
        target: :math:`y`, of a shape that broadcasts with that of `input`; it gets a gradient if it requires one. One
            of the two may be integers.
        size_average, reduce: deprecated, as in torch.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`, which divides by the sum of `weight`.
        weight: a factor for each element, of the shape of `input`. Default: 1.

    Returns:
        A scalar, or for `"none"` a tensor of the broadcast shape, of the promoted type (float32 for half-precision
        dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: `torch.nn.functional.mse_loss`.
    """
    _check_weight(weight, input, target)
    reduction = legacy_reduction(size_average, reduce, reduction)
    if weight is not None:
        _check_no_flags(input, target)
    return _together(_mse_loss, input, target, reduction, None, weight, True, integers=BOTH)


def rmse_loss(input: Tensor, target: Tensor, eps: float = 0.0, weight: Tensor | None = None) -> Tensor:
    r"""Compute the root of the mean squared error, with a gradient of 0 at a perfect fit.

    .. math:: \sqrt{\frac1n \sum_i (x_i - y_i)^2 + \epsilon}

    Args:
        input: predictions :math:`x` of any shape and floating point type, any strides.
        target: :math:`y`, of a shape that broadcasts with that of `input`; it gets a gradient if it requires one. One
            of the two may be integers.
        eps: :math:`\epsilon \ge 0`, which also bounds the gradient near a perfect fit. Default: 0.
        weight: a factor for each element, of the shape of `input`; the mean divides by their sum. Default: 1.

    Returns:
        A scalar of the promoted type (float32 for half-precision dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: the root of `torch.nn.functional.mse_loss`, which has no finite gradient at 0.
    """
    eps = check_number("eps", eps, 0.0)
    _check_weight(weight, input, target)
    mean = _together(
        _mse_loss, input, target, "mean", weight=weight, by_weight=True, wide=True, integers=BOTH
    )
    root = _formulas.safe_sqrt(mean + eps)
    dtype = promoted(input, target=target, weight=weight)
    return root if autocast_to_fp32(root.new_empty(0, dtype=dtype)) else root.to(dtype)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the absolute error :math:`\ell = |x - y|`; the derivative at :math:`x = y` is 0.

    Args:
        input: predictions :math:`x` of any shape and floating point type, any strides.
        target: :math:`y`, of a shape that broadcasts with that of `input`; it gets a gradient if it requires one. One
            of the two may be integers.
        size_average, reduce: deprecated, as in torch.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`, which divides by the sum of `weight`.
        weight: a factor for each element, of the shape of `input`. Default: 1.

    Returns:
        A scalar, or for `"none"` a tensor of the broadcast shape, of the promoted type (float32 for half-precision
        dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: `torch.nn.functional.l1_loss`.
    """
    _check_weight(weight, input, target)
    reduction = legacy_reduction(size_average, reduce, reduction)
    _check_no_flags(input, target)
    return _together(_l1_loss, input, target, reduction, None, weight, True, integers=BOTH)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Compute the smooth L1 loss, quadratic for errors below :math:`\beta` and linear above.

    .. math:: \ell = \begin{cases} e^2 / (2 \beta) & |e| < \beta \\ |e| - \beta / 2 & \text{else} \end{cases},
        \qquad e = x - y

    Args:
        input: predictions :math:`x` of any shape and floating point type, any strides.
        target: :math:`y`, of a shape that broadcasts with that of `input`; it gets a gradient if it requires one. One
            of the two may be integers.
        size_average, reduce: deprecated, as in torch.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.
        beta: :math:`\beta \ge 0`; 0 is the absolute error. Default: 1.

    Returns:
        A scalar, or for `"none"` a tensor of the broadcast shape, of the promoted type (float32 for half-precision
        dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and numbers that do not fit.

    Source: `torch.nn.functional.smooth_l1_loss`.
    """
    beta = real_number("beta", beta)
    if beta < 0:
        raise RuntimeError(f"beta: smooth_l1_loss does not support negative values, got {beta}")
    hparams = _smooth_l1_loss.pack(beta=check_number("beta", beta))
    reduction = legacy_reduction(size_average, reduce, reduction)
    return _together(_smooth_l1_loss, input, target, reduction, hparams, integers=BOTH)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the Huber loss, quadratic for errors up to :math:`\delta` and linear above.

    .. math:: \ell = \begin{cases} e^2 / 2 & |e| \le \delta \\ \delta (|e| - \delta / 2) & \text{else} \end{cases},
        \qquad e = x - y

    Args:
        input: predictions :math:`x` of any shape and floating point type, any strides.
        target: :math:`y`, of a shape that broadcasts with that of `input`; it gets a gradient if it requires one. It
            may be integers.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`, over all elements.
        delta: :math:`\delta > 0`. Default: 1.
        weight: a factor for each element, of the shape of `input`. Default: 1.

    Returns:
        A scalar, or for `"none"` a tensor of the broadcast shape, of the type of `input`, wider if `weight` is
        (float32 for half-precision dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and numbers that do not fit.

    Source: `torch.nn.functional.huber_loss`.
    """
    delta = real_number("delta", delta)
    if delta <= 0:
        raise RuntimeError(f"delta: huber_loss does not support non-positive values, got {delta}")
    _check_weight(weight, input, target)
    hparams = _huber_loss.pack(delta=check_number("delta", delta))
    loss = _together(_huber_loss, input, target, reduction, hparams, weight, integers=("target",))
    return loss if autocast_to_fp32(input) else loss.to(promoted(input, weight=weight))


def log_cosh_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", *, weight: Tensor | None = None
) -> Tensor:
    r"""Compute the log-cosh loss :math:`\log \cosh(x - y)`: quadratic for small errors, linear for large ones.

    Value and gradient, :math:`\tanh(x - y)`, keep their relative precision for errors of every size: neither does
    :math:`\cosh` overflow, nor do terms cancel near 0. A sum without weights takes one logarithm of a product in the
    place of many.

    Args:
        input: predictions :math:`x` of any shape and floating point type, any strides.
        target: :math:`y`, of a shape that broadcasts with that of `input`; it gets a gradient if it requires one. One
            of the two may be integers.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`, which divides by the sum of `weight`.
        weight: a factor for each element, of the shape of `input`. Default: 1.

    Returns:
        A scalar, or for `"none"` a tensor of the broadcast shape, of the promoted type (float32 for half-precision
        dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: Saleh and Saleh, https://arxiv.org/abs/2208.04564; `LogCosh` of Keras.
    """
    _check_weight(weight, input, target)
    _check_no_flags(input, target)
    return _together(_log_cosh_loss, input, target, reduction, None, weight, True, integers=BOTH)


def _check_probabilities(weight: Tensor | None, **tensors: Tensor) -> None:
    """Raise if a number that counts lies outside of [0, 1]."""
    for name, t in tensors.items():
        t = t.detach() if t.requires_grad else t
        low, high = t.aminmax()
        if low.item() >= 0 and high.item() <= 1:
            continue
        wrong = (t < 0) | (t > 1)
        if weight is not None and isinstance(weight, Tensor):
            wrong = wrong & (weight.detach() != 0)
        if wrong.any():
            raise RuntimeError(f"all elements of {name} should be between 0 and 1")


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute binary cross-entropy of probabilities, :math:`-w\,[y \log p + (1 - y) \log(1 - p)]`, logarithms >= -100.

    From logits, `binary_cross_entropy_with_logits` is the accurate one.

    Args:
        input: probabilities :math:`p` in [0, 1] of any shape and floating point type, any strides.
        target: :math:`y` in [0, 1], of the shape and type of `input`; it gets a gradient if it requires one.
        weight: :math:`w`, of a shape that broadcasts to that of `input`. Default: 1.
        size_average, reduce: deprecated, as in torch.
        reduction: `"none"`, `"mean"` (over all elements) or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of `input`; of its type (float32 for half-precision dtypes under
        autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types. RuntimeError on the CPU for numbers
            outside [0, 1]; on CUDA and in compiled code, where to look would wait, such an input gives NaN.

    Source: `torch.nn.functional.binary_cross_entropy`.
    """
    check_tensors(input, target=target)
    if target.shape != input.shape:
        raise ValueError(
            f"target: expected the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    check_floating("input", input)
    if target.dtype != input.dtype:
        raise RuntimeError(f"target: found dtype {target.dtype} but expected {input.dtype}, that of input")
    if values_visible(input) and values_visible(target) and input.numel():
        _check_probabilities(weight, input=input, target=target)
    mode = legacy_reduction(size_average, reduce, reduction)
    return _together(_binary_cross_entropy, input, target, mode, None, weight)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the binary cross-entropy of logits: :math:`-w\,[\omega y \log \sigma(x) + (1 - y) \log(1 - \sigma(x))]`.

    Every element keeps its relative precision for large :math:`|x|`. A sum without weights takes one logarithm
    of a product in the place of many.

    Args:
        input: logits :math:`x` of any shape and floating point type, any strides.
        target: :math:`y` in [0, 1], of the shape of `input`; it gets a gradient if it requires one.
        weight: :math:`w`, of a shape that broadcasts to that of `input`. Default: 1.
        size_average, reduce: deprecated, as in torch.
        reduction: `"none"`, `"mean"` (over all elements) or `"sum"`. Default: `"mean"`.
        pos_weight: :math:`\omega`, of a shape that broadcasts to that of `input`. Default: 1.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of `input`; of the type of `target` (float32 for
        half-precision dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: `torch.nn.functional.binary_cross_entropy_with_logits`.
    """
    check_tensors(input, target=target)
    if target.shape != input.shape:
        raise ValueError(
            f"target: expected the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    op = _binary if pos_weight is None else _weighted_binary
    mode = legacy_reduction(size_average, reduce, reduction)
    loss = _together(op, input, target, mode, None, weight, pos_weight=pos_weight)
    return loss if autocast_to_fp32(target) else loss.to(target.dtype)


def hinge_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    r"""Compute the hinge loss :math:`\ell = \max(0, 1 - y s)` of a score :math:`s` and a label :math:`y` of -1 or 1.

    Not `torch.nn.functional.hinge_embedding_loss`, which is of a distance.

    Args:
        input: scores :math:`s` of any shape and floating point type, any strides.
        target: labels :math:`y`, of a shape that broadcasts with that of `input`; they may be integers.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the broadcast shape, of the promoted type (float32 for half-precision
        dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: Cortes and Vapnik, Support-vector networks, 1995, https://doi.org/10.1007/BF00994018.
    """
    return _together(_hinge_loss, input, target, reduction, integers=("target",))


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Compute the KL divergence of log-probabilities from a target: :math:`q (\log q - x)`, 0 - q x at q = 0.

    Args:
        input: log-probabilities :math:`x` of any shape and floating point type, any strides.
        target: probabilities :math:`q`, or their logarithms, of a shape that broadcasts with that of `input`; it
            gets a gradient if it requires one.
        size_average, reduce: deprecated, as in torch.
        reduction: `"none"`, `"mean"` (over all elements), `"batchmean"` (the sum divided by the first size of
            `input`: the mathematical one) or `"sum"`. Default: `"mean"`.
        log_target: whether `target` holds logarithms. Default: False.

    Returns:
        A scalar, or for `"none"` a tensor of the broadcast shape, of the promoted type (float32 for half-precision
        dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: `torch.nn.functional.kl_div`.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce, reduction)
    elif reduction == "mean":
        warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            2,
        )
    check_tensors(input, target=target)
    hparams = _kl_div.pack(log_target=float(log_target))
    if reduction != "batchmean":
        return _together(_kl_div, input, target, reduction, hparams, warns=False)
    total = _together(_kl_div, input, target, "sum", hparams, warns=False)
    return total / input.shape[0] if input.dim() else total


_sigmoid_focal_loss = ElementOp("sigmoid_focal_loss", reference.elementwise.sigmoid_focal_element)


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
    r"""Compute the focal loss of independent binary classifications from logits, as RetinaNet does.

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
        ignore_index: rows of this class are ignored. Default: -100.
        background_index: rows of this class are negative in every column. Default: C.

    Returns:
        A tensor of the shape of `inputs` for `"none"`, else a scalar; of the type of `inputs` (float32 for
        half-precision dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError, IndexError: for unsupported shapes, types and values. On CUDA,
            where a look at the classes would wait for the device, a class out of bounds gives NaN instead.

    Source: https://arxiv.org/abs/1708.02002; `torchvision.ops.sigmoid_focal_loss`, classes as in
    `mmcv.ops.sigmoid_focal_loss`, `num_positives` with background -1 and ignored -2 as in apex.
    """
    mode = check_reduction(reduction)
    ignore_index = check_integer("ignore_index", ignore_index)
    hparams = _sigmoid_focal_loss.pack(
        alpha=check_number("alpha", alpha, high=1.0), gamma=check_number("gamma", gamma, low=0.0)
    )
    check_tensor("inputs", inputs)
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
        background = (
            NO_INDEX if background_index is None else check_integer("background_index", background_index)
        )
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
    norm = one_number("num_positives", norm if num_positives is None else num_positives, inputs)
    after = None
    if mode == REDUCTIONS["none"]:
        norm, after = None, norm
    options = (mode, hparams, ignore_index, background, autocast_to_fp32(inputs))
    loss = call_with_classes("targets", _sigmoid_focal_loss, (inputs, targets, weight, norm), options)
    return loss if after is None else (loss / after).to(loss.dtype)
