"""Statistics of rows of logits and log-probabilities of some of their classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.reference.classification import hidden_without_unweighted, nll_of, one_hot
from fastloss.reference.linear import logits_from

__all__ = [
    "entropy_from_logits",
    "linear_token_stats",
    "selective_log_softmax",
    "sequence_log_probs",
    "token_stats",
]


class TokenStats(NamedTuple):
    """Hold what `token_stats` returns: of the shape of the rows, `logp` and `is_top1` of the index's."""

    logp: Tensor | None
    entropy: Tensor
    lse: Tensor
    log_sum_p2: Tensor
    mean_logit: Tensor
    is_top1: Tensor | None


def token_stats(
    logits: Tensor,
    index: Tensor | None = None,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> TokenStats:
    """Compute `fastloss.functional.token_stats`."""
    z = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    counts = None if mask is None else mask != 0
    if counts is not None:
        z = torch.where(counts.unsqueeze(-1), z, 0.0)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature

    def kept(v: Tensor) -> Tensor:
        return (
            v
            if counts is None
            else torch.where(counts.view(counts.shape + (1,) * (v.dim() - counts.dim())), v, 0)
        )

    best = torch.arange(z.shape[-1], device=z.device) == z.argmax(-1, keepdim=True)
    # the likeliest class by what is left to the others: where they have next to nothing, log_softmax is off by it
    logp = torch.where(best, -nll_of(z, best, -1).unsqueeze(-1), z.log_softmax(-1))
    p = logp.exp()
    entropy = -(p * torch.where(z == -torch.inf, 0.0, logp)).sum(-1)
    of_index = top = None
    if index is not None:
        several = index if index.dim() == z.dim() else index.unsqueeze(-1)
        of_classes = one_hot(several, z.shape[-1]).unbind(-2)
        found = [-nll_of(z, of_class, -1) for of_class in of_classes]
        of_index = torch.stack(found, -1) if found else z[..., :0]
        of_index = of_index.view(index.shape)
        top = kept((z.gather(-1, several) == z.amax(-1, keepdim=True)).view(index.shape)).bool()
        of_index = kept(of_index)
    return TokenStats(
        of_index,
        kept(entropy),
        kept(z.logsumexp(-1)),
        kept((2 * logp).logsumexp(-1)),
        kept(z.mean(-1)),
        top,
    )


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute `fastloss.functional.selective_log_softmax`."""
    return token_stats(logits, index, temperature).logp


def entropy_from_logits(logits: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Compute `fastloss.functional.entropy_from_logits`."""
    return token_stats(logits, None, temperature, mask=mask).entropy


def sequence_log_probs(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    average: bool = False,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Compute `fastloss.functional.sequence_log_probs`."""
    valid = labels != ignore_index
    logp = token_stats(logits, torch.where(valid, labels, 0), temperature, mask=valid).logp
    return logp.sum(-1) / valid.sum(-1).clamp(min=1) if average else logp.sum(-1)


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor | None = None,
    temperature: float = 1.0,
    *,
    linear_bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    max_extra_bytes: int | None = None,
) -> TokenStats:
    """Compute `fastloss.functional.linear_token_stats`."""
    if mask is not None:
        input = hidden_without_unweighted(input, mask == 0)
    logits = logits_from(input, linear_weight, linear_bias)
    return token_stats(logits, index, temperature, mask=mask, softcap=softcap)
