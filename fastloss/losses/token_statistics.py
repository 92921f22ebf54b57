"""Log-probabilities, entropy and other statistics of rows of logits, in one read of the vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES, Op
from fastloss._ops.checks import check_floating, check_number, check_tensors
from fastloss._registry import Draw, Loss, register
from fastloss.losses.classification import cross_entropy_rows
from fastloss.losses.pointwise import NO_INDEX
from fastloss.reference.token_statistics import TokenStats

__all__ = ["entropy_from_logits", "selective_log_softmax", "sequence_log_probs", "token_stats"]

STATISTICS = 4  # entropy, lse, log_sum_p2, mean_logit; then the log-probabilities, then the flags


def planes_of_reference(logits, index, mask, scale, cap, everything):
    softcap = cap / scale if cap else None
    s = reference.token_stats(logits, index, 1 / scale, mask=mask, softcap=softcap)
    nothing = torch.zeros_like(s.entropy)
    planes = (
        [s.entropy, s.lse, s.log_sum_p2, s.mean_logit] if everything else [s.entropy, s.lse, nothing, nothing]
    )
    if index is not None:
        planes += [*s.logp.unbind(-1), *s.is_top1.to(s.entropy.dtype).unbind(-1)]
    return torch.stack(planes)


def _fake(logits, index, mask, scale, cap, everything):
    high = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = list(logits.shape[:-1])
    count = 1
    for size in rows:
        count = count * size
    planes = STATISTICS + (2 * index.shape[-1] if index is not None else 0)
    return logits.new_empty([planes, *rows], dtype=high), logits.new_empty([count, 6], dtype=high)


_stats = Op("token_stats", planes_of_reference, _fake, tensors=3)


def _check(logits: Tensor, index: Tensor | None, mask: Tensor | None, index_name: str = "index") -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a Tensor, got {type(logits).__name__}")
    if logits.dim() == 0:
        raise RuntimeError("logits: expected [..., V], got a tensor without dimensions")
    check_floating("logits", logits)
    check_tensors(logits, **{index_name: index, "mask": mask})
    rows = logits.shape[:-1]
    if index is not None:
        if index.dtype != torch.int64:
            raise RuntimeError(f"{index_name}: expected classes of type int64, got {index.dtype}")
        if index.shape[: len(rows)] != rows or index.dim() not in (len(rows), len(rows) + 1):
            raise RuntimeError(
                f"{index_name}: expected shape {tuple(rows)} or {(*rows, 'K')} for logits of shape "
                f"{tuple(logits.shape)}, got {tuple(index.shape)}"
            )
    if mask is not None and mask.shape != rows:
        raise RuntimeError(f"mask: expected shape {tuple(rows)}, got {tuple(mask.shape)}")


def _run(
    logits: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    everything: bool,
    index_name: str = "index",
) -> Tensor:
    scale = 1 / check_number("temperature", temperature, low=math.ulp(0.0))
    cap = 0.0 if softcap is None else check_number("softcap", softcap, low=math.ulp(0.0)) * scale
    if index is not None and index.dim() < logits.dim():
        index = index.unsqueeze(-1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach() != 0
    try:
        return _stats((logits, index, mask), (scale, cap, everything))
    except RuntimeError as error:
        if "is out of bounds" in str(error):
            raise IndexError(f"{index_name}: {error}") from None
        raise


def log_probs_of(
    logits: Tensor, index: Tensor, mask: Tensor | None, temperature: float = 1.0, index_name: str = "index"
) -> Tensor:
    """Log-probabilities of the classes `index` [..., K]; 0 in rows where `mask` is False."""
    planes = _run(logits, index, mask, temperature, None, False, index_name)
    return planes[STATISTICS : STATISTICS + index.shape[-1]].movedim(0, -1)


def stats_of_planes(planes: Tensor, index: Tensor | None) -> TokenStats:
    """Planes [4 + 2 K, ...] by name."""
    logp = top = None
    if index is not None:
        several = planes[STATISTICS:].movedim(0, -1)
        count = several.shape[-1] // 2
        logp, top = (
            several[..., :count].reshape(index.shape),
            several[..., count:].detach().reshape(index.shape) > 0,
        )
    return TokenStats(logp, *planes[:STATISTICS].unbind(0), top)


def label_log_probs(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int | None,
    temperature: float,
    labels_name: str,
) -> Tensor:
    """Log-probability of one class of each row, `labels` [...]; 0 where it is `ignore_index`, a row that is not read.

    That is what cross-entropy is made of, with the label's class kept apart from the sum over the others.
    """
    scale = 1 / check_number("temperature", temperature, low=math.ulp(0.0))
    ignored = NO_INDEX if ignore_index is None else ignore_index
    rows, target = logits, labels
    if logits.dim() > 2:
        flat = logits.is_contiguous()
        rows = logits.reshape(-1, logits.shape[-1]) if flat else logits.movedim(-1, 1)
        target = labels.reshape(-1) if flat else labels
    try:
        nll = cross_entropy_rows(
            (rows, target, None, None), (ignored, 0, scale, 0.0, [0.0, 0.0], True), False
        )
    except RuntimeError as error:
        if "is out of bounds" in str(error):
            raise IndexError(f"{labels_name}: {error}") from None
        raise
    return -nll.reshape(labels.shape)


def token_stats(
    logits: Tensor,
    index: Tensor | None = None,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> TokenStats:
    r"""Statistics of every row of logits from one read, with one joint backward.

    With :math:`z = c \tanh(x / c) / T` (temperature `T`, softcap `c`; without softcap :math:`z = x / T`) and
    :math:`p = \mathrm{softmax}(z)`:

    .. math:: \mathrm{logp}_k = \log p_k, \quad \mathrm{entropy} = -\sum_j p_j \log p_j, \quad
              \mathrm{lse} = \log \sum_j e^{z_j}, \quad \log \sum_j p_j^2, \quad
              \mathrm{mean\_logit} = \tfrac{1}{V} \sum_j z_j .

    The backward pass reads the logits once and writes their gradient once, whatever the upstream gradients of the
    first five are. No probabilities are stored. A logit of -inf has probability 0 and adds nothing to the entropy.
    The mean of the logits under `p` is `lse - entropy`.

    Args:
        logits: `[..., V]`; float32, float64, bfloat16 or float16. Leading dimensions may be strided, as those of
            `logits[:, :-1]` are, without a copy.
        index: classes, int64, `[...]` or `[..., K]`; the same class may stand there more than once.
        temperature: `T` > 0. Default: 1.
        mask: `[...]`, rows where it is 0 (False) are not read: their results are 0 and they have no gradient.
        softcap: `c` > 0, bounds the logits (Gemma 2). Default: none.

    Returns:
        The named tuple `(logp, entropy, lse, log_sum_p2, mean_logit, is_top1)`, of shape `[...]` each, `logp` and
        `is_top1` of the index's shape (None without an index), float32 for half types. `is_top1` says whether no
        class is more probable.

    Raises:
        TypeError, ValueError, RuntimeError: for arguments of a wrong kind, naming it.
        IndexError: on the CPU for a class out of bounds; on CUDA that has `logp` NaN.

    Source: the joint form of TRL's `selective_log_softmax` and `entropy_from_logits`; the sum of squared
    probabilities for WPO, https://arxiv.org/abs/2406.11827.
    """
    _check(logits, index, mask)
    planes = _run(logits, index, mask, temperature, softcap, True)
    return stats_of_planes(planes, index)


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Log-probabilities of chosen classes, :math:`z_k - \log \sum_j e^{z_j}` with :math:`z = x / T`.

    One read of the logits; nothing of their shape is stored. Right for any margin: the log-probability of a class
    that has all but :math:`e^{-80}` of the probability keeps its relative precision.

    Args:
        logits: `[..., V]`; float32, float64, bfloat16 or float16.
        index: classes, int64, of shape `[...]` or `[..., K]`.
        temperature: `T` > 0. Default: 1.

    Returns:
        A tensor of the shape of `index`, float32 for half types.

    Raises:
        TypeError, ValueError, RuntimeError: as for `token_stats`.

    Source: TRL's `selective_log_softmax`, https://github.com/huggingface/trl.
    """
    _check(logits, index, None)
    if index.dim() < logits.dim():
        return label_log_probs(logits, index, None, temperature, "index")
    return log_probs_of(logits, index, None, temperature)


def entropy_from_logits(logits: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""Entropy of the softmax of each row, :math:`-\sum_j p_j \log p_j` in nats, :math:`p = \mathrm{softmax}(x / T)`.

    One read of the logits; a logit of -inf adds nothing.

    Args:
        logits: `[..., V]`; float32, float64, bfloat16 or float16.
        temperature: `T` > 0. Default: 1.
        mask: `[...]`, rows where it is 0 (False) are not read: their entropy is 0 and they have no gradient.

    Returns:
        A tensor of shape `[...]`, float32 for half types.

    Raises:
        TypeError, ValueError, RuntimeError: as for `token_stats`.

    Source: TRL's `entropy_from_logits`, https://github.com/huggingface/trl.
    """
    _check(logits, None, mask)
    return _run(logits, None, mask, temperature, None, False)[0]


def sequence_log_probs(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    average: bool = False,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""Log-probability of each sequence, :math:`\sum_t \log p_t(y_t)` over the labels that are not ignored.

    Logits and labels are aligned: `labels[:, t]` is what `logits[:, t]` predicts. The logits are read once forward
    and once backward; rows that are ignored are not read.

    Args:
        logits: `[..., T, V]`, usually `[B, T, V]`; float32, float64, bfloat16 or float16.
        labels: `[..., T]`, int64.
        ignore_index: the label of tokens that do not count. Default: -100.
        average: divide by the number of tokens that count. Default: False.
        temperature: divides the logits. Default: 1.

    Returns:
        A tensor of shape `[...]` (`[B]`), float32 for half types; 0 for a sequence whose labels are all ignored.

    Raises:
        TypeError, ValueError, RuntimeError: as for `token_stats`, with `labels` for its `index`.

    Source: the log-probabilities of Rafailov et al., Direct Preference Optimization, https://arxiv.org/abs/2305.18290.
    """
    _check(logits, labels, None, "labels")
    if labels.dim() == 0 or labels.dim() == logits.dim():
        raise RuntimeError(f"labels: expected shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    total = label_log_probs(logits, labels, ignore_index, temperature, "labels").sum(-1)
    return total / (labels != ignore_index).sum(-1).clamp(min=1) if average else total


def _logits(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.normal(*shape, scale=3.0)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in HALF_TYPES else logits


def _eager_log_softmax(logits, index, temperature=1.0):
    several = index if index.dim() == logits.dim() else index.unsqueeze(-1)
    return (_wide(logits) / temperature).log_softmax(-1).gather(-1, several).reshape(index.shape)


def _eager_entropy(logits, temperature=1.0, mask=None):
    z = _wide(logits) / temperature
    entropy = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)  # as verl has it
    return entropy if mask is None else torch.where(mask != 0, entropy, 0.0)


def _eager_sequence(logits, labels, ignore_index=-100, average=False):
    valid = labels != ignore_index
    logp = _eager_log_softmax(logits, torch.where(valid, labels, 0))
    total = torch.where(valid, logp, 0.0).sum(-1)
    return total / valid.sum(-1).clamp(min=1) if average else total


def _some_labels(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    labels = draw.index(shape[-1], *shape[:-1])
    return torch.where(draw.index(3, *shape[:-1]) == 0, -100, labels)


def _traffic(shape: tuple[int, ...], itemsize: int, backward: bool) -> int:
    return (3 if backward else 1) * math.prod(shape) * itemsize


register(
    Loss(
        name="selective_log_softmax",
        family="statistics",
        function=selective_log_softmax,
        reference=reference.selective_log_softmax,
        eager=_eager_log_softmax,
        inputs=lambda d, s: {"logits": _logits(d, s), "index": d.index(s[-1], *s[:-1])},
        wrt=("logits",),
        forward_arguments=("logits", "index"),
        cases={
            "plain": {},
            "several": {"index": lambda d, s: d.index(s[-1], *s[:-1], 3), "temperature": 0.7},
        },
        shapes=((3, 33), (2, 4099), (2, 5, 7)),
        bench_shape=(1024, 32000),
        traffic=_traffic,
    )
)
register(
    Loss(
        name="entropy_from_logits",
        family="statistics",
        function=entropy_from_logits,
        reference=reference.entropy_from_logits,
        eager=_eager_entropy,
        inputs=lambda d, s: {"logits": _logits(d, s)},
        wrt=("logits",),
        forward_arguments=("logits", "mask"),
        cases={
            "plain": {},
            "masked": {"mask": lambda d, s: d.index(2, *s[:-1]) > 0, "temperature": 0.5},
        },
        shapes=((3, 33), (2, 4099), (2, 5, 7)),
        bench_shape=(1024, 32000),
        traffic=_traffic,
    )
)
register(
    Loss(
        name="sequence_log_probs",
        family="statistics",
        function=sequence_log_probs,
        reference=reference.sequence_log_probs,
        eager=_eager_sequence,
        inputs=lambda d, s: {"logits": _logits(d, s), "labels": d.index(s[-1], *s[:-1])},
        wrt=("logits",),
        forward_arguments=("logits", "labels"),
        cases={"plain": {}, "average": {"labels": _some_labels, "average": True}},
        shapes=((3, 4, 33), (2, 2, 1030)),
        bench_shape=(8, 512, 32000),
        traffic=_traffic,
    )
)
