"""Losses of angles and distances between embeddings and class centres; logits are never stored as a whole."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES, runs_on_cpu
from fastloss._ops.checks import (
    check_floating,
    check_number,
    check_reduction,
    check_row_weight,
    check_rows,
    check_tensors,
)
from fastloss._ops.chunked_linear import LinearAttrs, LinearInputs, extra_bytes, without_unweighted
from fastloss._ops.chunked_linear_loss import LinearOp
from fastloss._ops.logit_transforms import AngularMargin, Harmonic
from fastloss.losses.linear import as_autocast

__all__ = ["arcface_loss", "cosface_loss", "harmonic_loss"]


def _margin_reference(
    input, linear_weight, linear_bias, target, weight, row_weight, ignore_index, reduction, logit_scale, softcap,
    label_smoothing, z_loss, additive, margin, easy, straight, centres,
):  # fmt: skip
    logits = reference.angular_margin.margin_logits(
        input @ linear_weight.t(), target, margin, additive != 0, easy != 0, straight != 0, int(centres)
    )
    return reference.cross_entropy(
        logits, target, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        logit_scale=logit_scale, sample_weight=row_weight,
    )  # fmt: skip


def _harmonic_reference(
    input, linear_weight, linear_bias, target, weight, row_weight, ignore_index, reduction, logit_scale, softcap,
    label_smoothing, z_loss, n, eps,
):  # fmt: skip
    n = n or math.sqrt(input.shape[1] - 2)
    squares = (input @ linear_weight.t()).clamp(min=0) + eps
    return reference.cross_entropy(
        -n / 2 * squares.log(), target, weight, reduction=reduction, ignore_index=ignore_index,
        logit_scale=logit_scale, sample_weight=row_weight,
    )  # fmt: skip


_margin = LinearOp("margin_loss", _margin_reference, "cross_entropy", AngularMargin)
_harmonic = LinearOp("harmonic_loss", _harmonic_reference, "cross_entropy", Harmonic)


def _check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    ignore_index: int,
    centres: bool,
) -> tuple[Tensor | None, int]:
    """Check the arguments; return `sample_weight` and `ignore_index`."""
    check_tensors(input, weight=weight, target=target, sample_weight=sample_weight)
    if input.dim() != 2:
        raise RuntimeError(f"input: expected (N, D), got shape {tuple(input.shape)}")
    check_floating("input", input)
    if weight.dim() not in ((2, 3) if centres else (2,)) or weight.shape[-1] != input.shape[1]:
        expected = f"(C, {input.shape[1]})" + (f" or (C, K, {input.shape[1]})" if centres else "")
        raise RuntimeError(f"weight: expected {expected}, got shape {tuple(weight.shape)}")
    if weight.dtype != input.dtype:
        raise RuntimeError(f"weight: expected the dtype of input, {input.dtype}, got {weight.dtype}")
    if target.is_floating_point():
        raise RuntimeError(f"target: expected classes of type int64 or uint8, got {target.dtype}")
    like_logits = input.detach()[:, :1].expand(-1, weight.shape[0])
    _, ignore_index = check_rows(like_logits, target, None, ignore_index)
    return check_row_weight(sample_weight, input, target.shape), ignore_index


def _select_classes(
    weight: Tensor, target: Tensor, classes: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return weight and target restricted to the listed classes."""
    if classes is None:
        return weight, target
    check_tensors(weight, classes=classes)
    if classes.dim() != 1 or classes.dtype != torch.int64:
        raise RuntimeError(
            f"classes: expected a list of int64, got {classes.dtype} of shape {tuple(classes.shape)}"
        )
    place = torch.full((weight.shape[0],), -1, device=target.device)
    place = place.scatter(0, classes, torch.arange(classes.shape[0], device=target.device))
    kept = target != ignore_index
    if ignore_index == -1:
        raise ValueError("ignore_index: -1 marks the classes that are not listed; choose another")
    return weight[classes], torch.where(kept, place[torch.where(kept, target, 0)], ignore_index)


def _margin_loss(
    input, weight, target, s, m, reduction, additive, easy, straight, classes, ignore_index, label_smoothing,
    sample_weight, max_extra_bytes,
):  # fmt: skip
    mode = check_reduction(reduction)
    sample_weight, ignore_index = _check(input, weight, target, sample_weight, ignore_index, True)
    target = target.long()
    scale = check_number("s", s, low=math.ulp(0.0))
    smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    weight, target = _select_classes(weight, target, classes, ignore_index)
    centres = weight.shape[1] if weight.dim() == 3 else 1
    device = input.device.type
    dtype, autocast = input.dtype, torch.is_autocast_enabled(device)
    half = not autocast and dtype in HALF_TYPES
    if half:  # lengths may exceed the range of float16, in which the eps of normalize is 0
        input, weight = input.float(), weight.float()
    unit = F.normalize(without_unweighted(input, target, None, sample_weight, ignore_index))
    centre = F.normalize(weight.reshape(-1, weight.shape[-1]))
    if half and runs_on_cpu(input):  # the CPU multiplies unit vectors unrounded
        sample_weight = None if sample_weight is None else sample_weight.float()
    elif half:
        unit, centre = unit.to(dtype), centre.to(dtype)
    rows, centred = as_autocast(device, unit, centre)
    hparams = _margin.pack(
        label_smoothing=smoothing, z_loss=0.0, additive=float(additive), margin=m, easy=float(easy),
        straight=float(straight), centres=float(centres),
    )  # fmt: skip
    try:
        loss = _margin(
            LinearInputs(rows, centred, None, target, None, sample_weight),
            LinearAttrs(
                ignore_index=ignore_index, reduction=mode, logit_scale=scale, softcap=0.0, hparams=hparams,
                out_fp32=autocast, chunk=0, max_extra_bytes=extra_bytes(max_extra_bytes),
            ),
        )  # fmt: skip
    except IndexError:
        if classes is None:
            raise
        raise IndexError("target: expected classes that `classes` lists") from None
    return loss if autocast else loss.to(dtype)


def arcface_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    s: float = 64.0,
    m: float = 0.5,
    reduction: str = "mean",
    *,
    easy_margin: bool = False,
    margin_grad: str = "exact",
    classes: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    r"""Compute the ArcFace loss: cross-entropy of scaled cosines, with a margin on the angle to the target's centre.

    With :math:`\cos\theta_j = \langle \hat x, \hat w_j \rangle` of the normalised embedding and centres, the logits
    are :math:`s \cos\theta_j`, and for the target :math:`s\, \varphi(\theta_y)`,

    .. math:: \varphi(\theta) = \cos(\theta + m) \text{ if } \theta + m < \pi \text{, else } \cos\theta - m \sin m

    which keeps :math:`\varphi` decreasing; with `easy_margin`, :math:`\cos(\theta + m)` if :math:`\cos\theta > 0`, else
    :math:`\cos\theta`. Cosines are computed for a chunk of rows and turned into their gradient in place: beyond the
    normalised copies and the gradients that takes at most 128 MiB (on CUDA as much as `linear_cross_entropy`).
    Half-precision inputs are normalised in float32, on the CPU also multiplied.

    Args:
        input: embeddings of shape `(N, D)`, of any length; float32, float64, bfloat16 or float16.
        weight: class centres `(C, D)`, of the input's type; `(C, K, D)` for K centres of each class, of which the
            nearest counts.
        target: classes `(N)`, int64 or uint8.
        s: scale, > 0. Default: 64.
        m: margin in radians, in [0, pi / 2]. Default: 0.5.
        reduction: `"none"`, `"mean"` (over the rows that count) or `"sum"`.
        easy_margin: as above. Default: False.
        margin_grad: `"exact"`, or `"straight_through"`: the margin changes the logit, its gradient is that of the
            cosine, as in insightface. Default: `"exact"`.
        classes: int64 list of the classes that take part, each once and every target among them (Partial FC).
            Default: all.
        ignore_index: rows with this class are ignored. Default: -100.
        label_smoothing: in [0, 1]. Default: 0.
        sample_weight: a weight for each row. Default: 1.
        max_extra_bytes: the most bytes that the chunks may take, as for `linear_cross_entropy`. Default: as there.

    Returns:
        A scalar, or for `"none"` a tensor `(N)`, of the input's type; float32 under autocast.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: for invalid arguments, naming the argument; IndexError on the
            CPU alone, NaN on CUDA, for a target out of bounds or not listed.

    Source: Deng et al., https://arxiv.org/abs/1801.07698; sub-centres: Sub-center ArcFace (ECCV 2020); sampled
    classes: Partial FC, https://arxiv.org/abs/2203.15565.
    """
    if margin_grad not in ("exact", "straight_through"):
        raise ValueError(f"margin_grad: expected 'exact' or 'straight_through', got {margin_grad!r}")
    return _margin_loss(
        input, weight, target, s, check_number("m", m, 0.0, math.pi / 2), reduction, False, easy_margin,
        margin_grad == "straight_through", classes, ignore_index, label_smoothing, sample_weight, max_extra_bytes,
    )  # fmt: skip


def cosface_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    s: float = 64.0,
    m: float = 0.35,
    reduction: str = "mean",
    *,
    classes: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    r"""Compute the CosFace loss: cross-entropy of scaled cosines, with a margin on the cosine to the target's centre.

    As `arcface_loss`, with the target's logit :math:`s (\cos\theta_y - m)`.

    Args:
        input: embeddings of shape `(N, D)`, of any length; float32, float64, bfloat16 or float16.
        weight: class centres `(C, D)`, of the input's type; `(C, K, D)` for K centres of each class.
        target: classes `(N)`, int64 or uint8.
        s: scale, > 0. Default: 64.
        m: margin of the cosine. Default: 0.35.
        reduction: `"none"`, `"mean"` (over the rows that count) or `"sum"`.
        classes: int64 list of the classes that take part, each once and every target among them. Default: all.
        ignore_index: rows with this class are ignored. Default: -100.
        label_smoothing: in [0, 1]. Default: 0.
        sample_weight: a weight for each row. Default: 1.
        max_extra_bytes: the most bytes that the chunks may take, as for `linear_cross_entropy`. Default: as there.

    Returns:
        A scalar, or for `"none"` a tensor `(N)`, of the input's type; float32 under autocast.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as for `arcface_loss`.

    Source: Wang et al., https://arxiv.org/abs/1801.09414.
    """
    return _margin_loss(
        input, weight, target, s, check_number("m", m), reduction, True, False, False, classes, ignore_index,
        label_smoothing, sample_weight, max_extra_bytes,
    )  # fmt: skip


def harmonic_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    n: float | None = None,
    reduction: str = "mean",
    *,
    eps: float = 1e-8,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    r"""Compute the harmonic loss: probabilities fall with a power of the distance to the class centres.

    .. math:: -\log p_y, \quad p_j = \frac{d_j^{-n}}{\sum_k d_k^{-n}}, \quad
              d_j = \sqrt{\lVert x - w_j \rVert^2 + \varepsilon}

    It is invariant to a common scale of `x` and `w`; the softmax of :math:`-d^2` that is sometimes used in its place is
    not. Distances come from :math:`\lVert x \rVert^2 + \lVert w \rVert^2 - 2 x w` in float32 (float64), of one chunk of
    rows at a time; a squared distance has the rounding of the squared lengths.

    Args:
        input: of shape `(N, D)`; float32, float64, bfloat16 or float16.
        weight: class centres `(C, D)`, of the input's type.
        target: classes `(N)`, int64 or uint8.
        n: exponent, > 0. Default: :math:`\sqrt D`.
        reduction: `"none"`, `"mean"` (over the rows that count) or `"sum"`.
        eps: :math:`\varepsilon`, > 0. Default: 1e-8.
        ignore_index: rows with this class are ignored. Default: -100.
        sample_weight: a weight for each row. Default: 1.
        max_extra_bytes: the most bytes that the chunks may take, as for `linear_cross_entropy`. Default: as there.

    Returns:
        A scalar, or for `"none"` a tensor `(N)`, of the input's type; float32 under autocast, which changes nothing
        else.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: for invalid arguments, naming the argument.

    Source: Baek et al., Harmonic Loss Trains Interpretable AI Models, https://arxiv.org/abs/2502.01628.
    """
    mode = check_reduction(reduction)
    sample_weight, ignore_index = _check(input, weight, target, sample_weight, ignore_index, False)
    power = 0.0 if n is None else check_number("n", n, low=math.ulp(0.0))
    dtype = input.dtype
    if dtype in HALF_TYPES:
        input, weight = input.float(), weight.float()
        sample_weight = None if sample_weight is None else sample_weight.float()
    input = without_unweighted(input, target, None, sample_weight, ignore_index)
    # the squared distance as one GEMM
    x = torch.cat([-2 * input, torch.ones_like(input[:, :1]), input.square().sum(1, keepdim=True)], 1)
    w = torch.cat([weight, weight.square().sum(1, keepdim=True), torch.ones_like(weight[:, :1])], 1)
    hparams = _harmonic.pack(
        label_smoothing=0.0, z_loss=0.0, n=power, eps=check_number("eps", eps, math.ulp(0.0))
    )
    loss = _harmonic(
        LinearInputs(x, w, None, target.long(), None, sample_weight),
        LinearAttrs(
            ignore_index=ignore_index, reduction=mode, logit_scale=1.0, softcap=0.0, hparams=hparams, out_fp32=False,
            chunk=0, max_extra_bytes=extra_bytes(max_extra_bytes),
        ),
    )  # fmt: skip
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(dtype)
