"""Losses of hidden states: a linear layer fused with the loss of its logits, which are never stored as a whole."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._ops.checks import (
    check_number,
    check_reduction,
    check_row_weight,
    check_rows,
    check_tensors,
    real_number,
)
from fastloss._ops.chunked_linear import LinearAttrs, LinearInputs, extra_bytes, without_unweighted
from fastloss._ops.chunked_linear_loss import LinearOp
from fastloss._ops.dtypes import accumulation_dtype
from fastloss.losses import classification

__all__ = ["linear_cross_entropy"]


def _linear_cross_entropy_reference(
    input, linear_weight, linear_bias, target, weight, row_weight, ignore_index, reduction, logit_scale, softcap,
    label_smoothing, z_loss,
):  # fmt: skip
    return reference.linear_cross_entropy(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, ignore_index=ignore_index,
        reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss, logit_scale=logit_scale, softcap=softcap,
        sample_weight=row_weight,
    )  # fmt: skip


_linear_cross_entropy = LinearOp("linear_cross_entropy", _linear_cross_entropy_reference, "cross_entropy")


def as_autocast(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast floating-point tensors to the autocast dtype if autocast is enabled."""
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    autocast_dtype = torch.get_autocast_dtype(device)
    return [
        t.to(autocast_dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Check the linear layer's arguments as torch does."""
    check_tensors(input, linear_weight=linear_weight, linear_bias=linear_bias)
    if input.dim() == 0:
        raise RuntimeError("input: expected (..., in_features), got a tensor without dimensions")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"linear_weight: expected at least 2 dimensions, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"linear_weight: expected {input.shape[-1]} in_features as input has, got {linear_weight.shape[-1]}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"linear_bias: expected shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise RuntimeError("input: expected (N, in_features) for a linear_weight of more than 2 dimensions")
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(f"{name}: expected the dtype of input, {input.dtype}, got {t.dtype}")
    if not input.is_floating_point():
        raise NotImplementedError(f"input: expected a floating point type, got {input.dtype}")


def _chunk_rows(options: torch.nn.LinearCrossEntropyOptions | None, dtype: torch.dtype) -> int:
    """Return the chunk size that `options` request; 0: none."""
    if options is None:
        return 0
    if not isinstance(options, torch.nn.LinearCrossEntropyOptions):
        raise TypeError(f"options: expected LinearCrossEntropyOptions or None, got {type(options).__name__}")
    acc_dtype = accumulation_dtype(dtype)
    if options.acc_dtype not in (None, dtype, acc_dtype):
        raise ValueError(
            f"options: expected acc_dtype {acc_dtype}, in which sums are done, got {options.acc_dtype}"
        )
    return options.batch_chunk_size or 0


def _flat(
    input: Tensor, linear_weight: Tensor, target: Tensor, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states (..., in_features) as rows, and what goes with them."""
    rows, classes = input.shape[:-1], linear_weight.shape[0]
    if linear_weight.dim() != 2:
        raise RuntimeError(
            f"linear_weight: expected (C, in_features) for an input of more than 2 dimensions, got shape "
            f"{tuple(linear_weight.shape)}"
        )
    if target.shape == rows:
        target = target.flatten()
    elif target.is_floating_point() and target.shape == (*rows, classes):
        target = target.flatten(0, -2)
    else:
        raise RuntimeError(
            f"target: expected classes of shape {tuple(rows)} or probabilities of shape {(*rows, classes)}, got "
            f"{target.dtype} of shape {tuple(target.shape)}"
        )
    if sample_weight is not None:
        sample_weight = check_row_weight(sample_weight, input, rows).flatten()
    return input.flatten(0, -2), target, sample_weight


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: torch.nn.LinearCrossEntropyOptions | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    r"""Compute the cross-entropy of the logits `input @ linear_weight.T + linear_bias`, in chunks of rows.

    The loss is `cross_entropy`'s: with :math:`x = W h + b`, :math:`z = c \tanh(s x / c)` (without softcap
    :math:`z = s x`) and :math:`\mathrm{lse} = \log \sum_c e^{z_c}`, a row with class :math:`y` has

    .. math:: w_y \left[(1 - \varepsilon)(\mathrm{lse} - z_y) + \zeta\, \mathrm{lse}^2\right]
              + \frac{\varepsilon}{C} \sum_c w_c (\mathrm{lse} - z_c)

    and with probabilities :math:`q`, :math:`\sum_c w_c [(1 - \varepsilon) q_c + \varepsilon / C]
    (\mathrm{lse} - z_c) + \zeta\, \mathrm{lse}^2`.

    Logits of a chunk of rows are computed, turned into their gradient in place and multiplied on. Beyond the gradients
    that takes at most 128 MiB on the CPU (while one row of logits is smaller than that), and on CUDA as much as the
    weight has in float32, if that is more, up to 1 GiB; `max_extra_bytes` lowers it. Gradients of half-precision dtypes
    are collected in float32 and so take 4 bytes an element until backward (that of a large bfloat16 weight on CUDA
    only until forward ends, and not at all where one chunk does). For "mean" and "sum" the gradients of `input`,
    `linear_weight` and `linear_bias` are computed in forward, those that are required. On the CPU rows that are
    ignored, or have a `sample_weight` of 0, are left out of the GEMMs; on CUDA, where counting them would synchronise,
    they are not.

    Args:
        input: hidden states `(in_features)`, `(N, in_features)` or `(..., in_features)`, such as `(B, T, in_features)`;
            float32, float64, bfloat16 or float16.
        linear_weight: `(C, in_features)`, of the input's type; `(C, d1, ..., in_features)` for a loss in K
            dimensions, whose logits are made all at once.
        target: classes, int64 (or uint8), shape `()` or `(N)` (`(N, d1, ...)`), or `(...)` as `input`; or probabilities
            of the logits' shape.
        linear_bias: `(C)` (`(C, d1, ...)`). Default: none.
        weight: `(C)`, a weight :math:`w` for each class. Default: 1.
        reduction: `"none"`, `"sum"` or `"mean"`: the sum over rows divided by the sum of :math:`w_y` times
            `sample_weight` over the rows that are not ignored (with probabilities: of `sample_weight`).
        ignore_index: rows with this class are ignored and have no gradient. Default: -100.
        label_smoothing: :math:`\varepsilon` in [0, 1]. Default: 0.
        options: torch's `LinearCrossEntropyOptions`. Its `batch_chunk_size` is the most rows in a chunk (fewer if
            memory requires it), of C logits each, in float32 on the CPU and in the input's type on CUDA; its policies
            do not apply here: sums are always in float32 (float64), and a graph may always be retained. Default: None.
        logit_scale: :math:`s`, multiplies the logits. Default: 1.
        softcap: :math:`c > 0`, bounds the logits (Gemma 2). Default: none.
        z_loss: :math:`\zeta`, pulls lse towards 0 (PaLM, ST-MoE). Default: 0.
        sample_weight: a weight for each row, of the shape of the classes. Default: 1.
        max_extra_bytes: the most bytes that a call may take beyond the gradients, in whatever type these are collected:
            for the logits of a chunk, copies of its rows, and on the CPU 12 MiB of packed panels. Fewer mean smaller
            chunks, more time, and gradients that may differ in the last bits. Too few for one row are an error, and so
            is any number where the logits are made all at once. Default: as above.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the classes, of the input's type. Under autocast the GEMMs
        run in the autocast dtype, as those of `linear`, and the loss is float32.

    Raises:
        ValueError, RuntimeError, IndexError: where torch raises them. On CUDA, where checking would synchronise, a
            class out of bounds gives NaN instead.

    Source: `torch.nn.functional.linear_cross_entropy`; Cut Your Losses https://arxiv.org/abs/2411.09009, Liger
    https://arxiv.org/abs/2410.10989, softcap https://arxiv.org/abs/2408.00118, z-loss
    https://arxiv.org/abs/2204.02311.
    """
    mode = check_reduction(reduction)
    check_tensors(
        input, linear_weight=linear_weight, target=target, weight=weight, sample_weight=sample_weight
    )
    device = input.device.type
    autocast = torch.is_autocast_enabled(device)
    input, linear_weight, linear_bias = as_autocast(device, input, linear_weight, linear_bias)
    check_linear(input, linear_weight, linear_bias)
    shape = None
    if input.dim() > 2:
        shape = input.shape[:-1]
        input, target, sample_weight = _flat(input, linear_weight, target, sample_weight)
    classes = linear_weight.shape[:-1]
    logits = input.detach().new_empty(1).expand(*input.shape[:-1], *classes)  # their shape, device and type
    if target.shape == logits.shape and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignored = -100 if ignore_index is None else ignore_index
    weight, ignored = check_rows(logits, target, weight, ignored)
    label_smoothing = real_number("label_smoothing", label_smoothing)
    sample_weight = check_row_weight(sample_weight, input, input.shape[:-1] + classes[1:])
    chunk = _chunk_rows(options, input.dtype)
    soft = target.is_floating_point()
    if len(classes) > 1 or (soft and target.dtype != input.dtype):
        if max_extra_bytes is not None:
            raise ValueError(
                "max_extra_bytes: expected None for a linear_weight of more than 2 dimensions and for probabilities of "
                "another type than input, whose logits are made all at once"
            )
        input = without_unweighted(input, target, None if label_smoothing else weight, sample_weight, ignored)
        made = F.linear(input, linear_weight.reshape(-1, linear_weight.shape[-1])).view(logits.shape)
        loss = classification.cross_entropy(
            made if linear_bias is None else made + linear_bias, target, weight, ignore_index=ignored,
            reduction=reduction, label_smoothing=label_smoothing, logit_scale=logit_scale, softcap=softcap,
            z_loss=z_loss, sample_weight=sample_weight,
        )  # fmt: skip
        return loss if shape is None or reduction != "none" else loss.view(shape)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing: expected a number between 0.0 and 1.0, got {label_smoothing}")
    cap = 0.0 if softcap is None else check_number("softcap", softcap, low=math.ulp(0.0))
    hparams = _linear_cross_entropy.pack(
        label_smoothing=label_smoothing, z_loss=check_number("z_loss", z_loss)
    )
    if target.dtype == torch.uint8:
        target = target.long()
    single = input.dim() == 1
    if single:
        input = input.unsqueeze(0)
        target = target.unsqueeze(0) if soft else target.reshape(1)
        sample_weight = None if sample_weight is None else sample_weight.reshape(1)
    loss = _linear_cross_entropy(
        LinearInputs(input, linear_weight, linear_bias, target, weight, sample_weight),
        LinearAttrs(
            ignore_index=ignored, reduction=mode, logit_scale=check_number("logit_scale", logit_scale),
            softcap=cap, hparams=hparams, out_fp32=autocast, chunk=chunk,
            max_extra_bytes=extra_bytes(max_extra_bytes),
        ),
    )  # fmt: skip
    if reduction != "none":
        return loss
    if shape is not None:
        return loss.view(shape)
    return loss.squeeze(0) if single else loss
