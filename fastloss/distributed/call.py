"""The state of one contrastive loss call that all ranks agree on, and its reductions over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.reductions import reduced
from fastloss._ops.similarity import SoftmaxAttrs, SoftmaxInputs
from fastloss.distributed.collectives import Ranks, agreed, check_group, completed, everyone, multiplied
from fastloss.distributed.exchange import EXCHANGES
from fastloss.distributed.similarities import softmax


class Call:
    """The state of one loss call that all ranks agree on: numbers of rows and columns, exchange, reduction."""

    def __init__(self, name, x, group, exchange, for_ddp, rows_per_rank, reduction, columns=None, **given):
        check_group(group)
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange: expected 'gather' or 'ring', got {exchange!r}")
        size, rank, rows = dist.get_world_size(group), dist.get_rank(group), x.shape[0]
        if for_ddp is None and size > 1:
            raise TypeError(
                f"for_ddp: expected True or False with {size} ranks: True if their parameters' gradients are averaged, "
                "as by DistributedDataParallel and FSDP, False if they are added up"
            )
        if rows_per_rank is not None and (len(rows_per_rank) != size or rows_per_rank[rank] != rows):
            raise ValueError(
                f"rows_per_rank: expected {size} numbers, of which rank {rank} has {rows}, got {rows_per_rank}"
            )
        columns = rows if columns is None else columns
        counts = [[n, n + columns - rows] for n in rows_per_rank or [rows] * size]
        if x.is_cpu:
            same = {f"{next(iter(given))}.shape[1]": x.shape[1], "dtype": x.dtype, "reduction": reduction}
            same |= {"exchange": exchange, "for_ddp": bool(for_ddp)}
            grad = torch.is_grad_enabled()
            for key, t in given.items():
                same[key] = t
                if isinstance(t, Tensor):
                    same[key] = "a tensor"
                    same[f"{key}.requires_grad"] = grad and t.requires_grad
            counts = agreed(name, group, (rows, columns), same)
            if rows_per_rank is not None and [n for n, _ in counts] != list(rows_per_rank):
                raise ValueError(f"rows_per_rank: got {rows_per_rank}, but the ranks have {counts}")
        self.rows, self.columns = (Ranks(group, of) for of in zip(*counts, strict=True))
        self.exchange, self.reduction, self.factor = EXCHANGES[exchange], reduction, size if for_ddp else 1

    def features(self, *tensors: Tensor | None) -> list[Tensor | None]:
        return [t if t is None or self.factor == 1 else multiplied(t, self.factor) for t in tensors]

    def number(self, value: Tensor) -> Tensor:
        """Return a scalar in the accumulation dtype, so that ranks' parts of its gradient are added up unrounded."""
        return completed(value.to(accumulation_dtype(value.dtype)), self.rows)

    def softmax(
        self, inputs: SoftmaxInputs, attrs: SoftmaxAttrs, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        return softmax(inputs, attrs, ranks, self.exchange)

    def to_reduce(self, loss: Tensor, weight: Tensor | None, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
        """Return losses and weights of all ranks' rows, or of this rank's rows for `"none"`."""
        if self.reduction == "none":
            return loss, weight
        return everyone(loss, ranks), None if weight is None else everyone(weight, ranks)

    def reduced(self, loss: Tensor, weight: Tensor | None, dtype: torch.dtype, ranks: Ranks) -> Tensor:
        return reduced(*self.to_reduce(loss, weight, ranks), self.reduction, dtype)
