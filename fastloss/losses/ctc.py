"""Connectionist temporal classification: losses over all alignments of a sequence with a shorter one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import Op
from fastloss._ops.checks import check_floating, check_integer, check_reduction, check_tensor, check_tensors
from fastloss._ops.dtypes import accumulation_dtype, autocast_to_fp32

__all__ = ["ctc_loss"]


def _fake(input, targets, input_lengths, target_lengths, blank, from_logits, zero_infinity):
    acc_dtype = accumulation_dtype(input.dtype)
    steps, batch, _ = input.shape
    return (
        input.new_empty([batch], dtype=acc_dtype),
        input.new_empty([batch, steps, 2 * targets.shape[1] + 1], dtype=acc_dtype),
        input.new_empty([2 if from_logits else 1, steps, batch], dtype=acc_dtype),
    )


def _gradient_like(x: Tensor) -> Tensor:
    """Return an empty tensor as the kernel's gradient: of the input's strides where its classes lie together."""
    like = torch.empty_like(x)
    together = x.shape[2] <= 1 or (x.stride(2) == 1 and like.stride(2) == 1)
    return like if together else x.new_empty(x.shape)


_ctc = Op("ctc", reference.ctc.ctc_rows, _fake, tensors=4, gradient_like=_gradient_like)


def _lengths(name: str, value: Tensor | Sequence[int], like: Tensor, batch: int) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            lengths = list(value) if isinstance(value, Iterable) else [value]
            value = torch.tensor([check_integer(name, n) for n in lengths], dtype=torch.int64)
        except TypeError as error:
            raise TypeError(f"{name}: expected a Tensor or a sequence of integers") from error
        value = value.to(like.device)
    _check_integers(name, value)
    if value.numel() != batch or value.dim() > 1:
        raise RuntimeError(f"{name}: expected {batch} numbers, got shape {tuple(value.shape)}")
    return value.reshape(batch).to(like.device)  # CPU lengths are allowed with CUDA inputs


def _check_integers(name: str, t: Tensor) -> None:
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise RuntimeError(f"{name}: expected integers, got {t.dtype}")


def _padded(targets: Tensor, lengths: Tensor) -> Tensor:
    """Pad concatenated targets to [N, L]."""
    total = int(lengths.sum())
    if total > targets.numel() or (lengths.numel() and int(lengths.min()) < 0):
        raise RuntimeError(
            f"target_lengths: expected numbers that add up to at most {targets.numel()} targets"
        )
    width = int(lengths.max()) if lengths.numel() else 0
    if targets.numel() == 0:
        return targets.new_zeros([lengths.numel(), width])
    first = (lengths.cumsum(0) - lengths).unsqueeze(1)
    place = first + torch.arange(width, device=targets.device)
    return targets[place.clamp(max=targets.numel() - 1)]


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    from_logits: bool = False,
) -> Tensor:
    r"""Compute the CTC loss: negative log-likelihood of a target over all its alignments with the input.

    .. math:: L = -\log \sum_{\pi: B(\pi) = l} \prod_t p_t(\pi_t)

    where :math:`B` removes from a path first repeated classes, then blanks. Computed in log space by recursion from
    both ends. With `from_logits` the rows are normalised on the fly: log-probabilities `[T, N, C]` are never stored,
    nor is their gradient.

    The gradient is the derivative with respect to `log_probs`: minus the posterior of each class.
    `torch.nn.functional.ctc_loss` adds the probabilities, assuming a preceding log_softmax, after which both agree.

    Args:
        log_probs: log-probabilities `(T, N, C)` or `(T, C)`, with `from_logits` logits; float32, float64, bfloat16 or
            float16. Half-precision dtypes are computed in float32.
        targets: integers `(N, S)` padded or `(sum of target_lengths)` concatenated, without blanks; `(S)` for one
            sequence.
        input_lengths, target_lengths: `(N)`, for one sequence `()` or `(1)`; tensors of integers or sequences of them.
        blank: class of the blank. Default: 0.
        reduction: `"none"`, `"mean"`: each loss divided by its target's length (or 1), then the mean over the batch;
            or `"sum"`. Default: `"mean"`.
        zero_infinity: whether a target that is too long for its input has loss and gradient 0, instead of infinite and
            NaN. Default: False.
        from_logits: whether `log_probs` are logits. Default: False.

    Returns:
        A scalar, or for `"none"` a tensor of shape `(N)`, `()` for one sequence.

    Raises:
        RuntimeError, ValueError, TypeError: for unsupported shapes, types and options. Lengths and classes out of range
            are found on the CPU; on CUDA, where checking would synchronise, they give NaN. Concatenated targets
            synchronise if their lengths are on a CUDA device.

    Source: Graves et al., ICML 2006; `torch.nn.functional.ctc_loss`.
    """
    check_reduction(reduction)
    check_tensor("log_probs", log_probs)
    check_tensors(log_probs, targets=targets)
    check_floating("log_probs", log_probs)
    for name, t in (("input_lengths", input_lengths), ("target_lengths", target_lengths)):
        if isinstance(t, Tensor) and t.device != log_probs.device and t.device.type != "cpu":
            raise RuntimeError(
                f"{name}: expected the device of log_probs, {log_probs.device}, got {t.device}"
            )
    if log_probs.dim() not in (2, 3):
        raise RuntimeError(f"log_probs: expected (T, N, C) or (T, C), got {tuple(log_probs.shape)}")
    _check_integers("targets", targets)
    single = log_probs.dim() == 2
    x = log_probs.unsqueeze(1) if single else log_probs
    batch, classes = x.shape[1:]
    blank = check_integer("blank", blank)
    if not 0 <= blank < classes:
        raise RuntimeError(f"blank: expected a class in [0, {classes}), got {blank}")
    inputs = _lengths("input_lengths", input_lengths, x, batch)
    labels = _lengths("target_lengths", target_lengths, x, batch)
    if targets.dim() == 1:
        targets = targets.unsqueeze(0) if single else _padded(targets, labels)
    if targets.dim() != 2 or targets.shape[0] != batch:
        raise RuntimeError(
            f"targets: expected ({batch}, S) or one dimension, got shape {tuple(targets.shape)}"
        )
    loss = _ctc((x, targets, inputs, labels), (blank, bool(from_logits), bool(zero_infinity)))
    if reduction == "mean":
        loss = (loss / labels.clamp(min=1)).mean()
    elif reduction == "sum":
        loss = loss.sum()
    elif single:
        loss = loss.squeeze(0)
    return loss if autocast_to_fp32(log_probs) else loss.to(log_probs.dtype)
