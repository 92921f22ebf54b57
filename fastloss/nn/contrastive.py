"""Modules of the functions in `fastloss.losses.contrastive`."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fastloss import distributed
from fastloss import functional as F
from fastloss._ops.checks import check_reduction, number
from fastloss._ops.dtypes import accumulation_dtype
from fastloss.distributed.collectives import multiplied
from fastloss.nn._base import LossModule

__all__ = ["ClipLoss", "InfoNCELoss", "SigLipLoss"]


def check_ranks(rank: int, world_size: int) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"world_size: {world_size} ranks need torch.distributed; call init_process_group first"
        )
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise ValueError(
            f"rank, world_size: expected {dist.get_rank()} and {dist.get_world_size()}, those of the default process "
            f"group, got {rank} and {world_size}"
        )


def shared(world_size: int, *numbers: float | Tensor | None) -> list[float | Tensor | None]:
    """Return numbers that are the same on every rank; each gets the mean of the ranks' gradients, not their sum."""
    return [multiplied(n, 1 / world_size) if isinstance(n, Tensor) else n for n in numbers]


def of_this_rank(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Reduce this rank's rows, which are weighted; a mean is divided by the sum of the weights."""
    check_reduction(reduction)
    if reduction == "none":
        return rows
    dtype = accumulation_dtype(rows.dtype)
    total = rows.sum(dtype=dtype)
    if reduction == "mean":
        total = total / (rows.shape[0] if weight is None else weight.sum(dtype=dtype))
    return total.to(rows.dtype)


class ClipLoss(LossModule):
    """Module of `fastloss.functional.clip_loss` with the constructor and call of open_clip's `ClipLoss`.

    Called with features of images and texts, scale and bias, and by keyword the pairs' weights; with `output_dict` the
    loss comes as `{"contrastive_loss": loss}`.

    For a `world_size` above 1 value and gradients are open_clip's with the same `local_loss` and
    `gather_with_grad`; the latter makes the gradients, which DistributedDataParallel averages, those of one
    process. There are no labels for `cache_labels` to keep.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        reduction: str = "mean",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: expected False; ranks exchange features by torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.reduction = reduction
        self.normalize = normalize

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        x, y = image_features, text_features
        if self.world_size > 1:
            check_ranks(self.rank, self.world_size)
        if self.world_size == 1:
            loss = F.clip_loss(
                x,
                y,
                logit_scale,
                logit_bias,
                reduction=self.reduction,
                sample_weight=sample_weight,
                normalize=self.normalize,
            )
        elif self.local_loss and not self.gather_with_grad:
            loss = self._of_own_rows(x, y, logit_scale, logit_bias, sample_weight)
        else:
            if self.local_loss:
                logit_scale, logit_bias = shared(self.world_size, logit_scale, logit_bias)
            loss = distributed.clip_loss(
                x,
                y,
                logit_scale,
                logit_bias,
                reduction="none" if self.local_loss else self.reduction,
                sample_weight=sample_weight,
                normalize=self.normalize,
                for_ddp=self.gather_with_grad and not self.local_loss,
            )
            if self.local_loss:
                loss = of_this_rank(loss, sample_weight, self.reduction)
        return {"contrastive_loss": loss} if output_dict else loss

    def _of_own_rows(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        sample_weight: Tensor | None,
    ) -> Tensor:
        """Contrast own images with all texts, and own texts with all images, which have no gradient."""
        both = [
            F.multiple_negatives_ranking_loss(
                own,
                distributed.all_gather(others.detach()),
                scale=logit_scale,
                normalize=self.normalize,
                reduction=self.reduction,
                sample_weight=sample_weight,
                label_offset=self.rank * own.shape[0],
            )
            for own, others in ((x, y), (y, x))
        ]
        loss = 0.5 * (both[0] + both[1])
        if logit_bias is not None:  # changes nothing
            loss = loss + 0 * number("logit_bias", logit_bias, x).reshape(()).to(loss.dtype)
        return loss


class SigLipLoss(LossModule):
    """Module of `fastloss.functional.siglip_loss` with the constructor and call of open_clip's `SigLipLoss`.

    Called with features of images and texts, scale and bias, and by keyword the images' weights; with `output_dict` the
    loss comes as `{"contrastive_loss": loss}`.

    For a `world_size` above 1 each rank has the loss of its own images and the texts of all ranks, with open_clip's
    value and gradients, which DistributedDataParallel makes those of one process. `dist_impl` is "bidir" (default) or
    "shift", which pass texts around (`exchange="ring"` of `fastloss.distributed.siglip_loss`), or "gather" or "reduce",
    for which each rank holds all. There are no labels for `cache_labels` to keep.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        label_offset: int | None = 0,
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"dist_impl: expected 'bidir', 'shift', 'reduce', 'gather' or None, got {dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.reduction = reduction
        self.normalize = normalize
        self.label_offset = label_offset

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        if self.world_size == 1:
            loss = F.siglip_loss(
                image_features,
                text_features,
                logit_scale,
                logit_bias,
                reduction=self.reduction,
                sample_weight=sample_weight,
                normalize=self.normalize,
                label_offset=self.label_offset,
            )
        else:
            check_ranks(self.rank, self.world_size)
            logit_scale, logit_bias = shared(self.world_size, logit_scale, logit_bias)
            rows = distributed.siglip_loss(
                image_features,
                text_features,
                logit_scale,
                logit_bias,
                reduction="none",
                sample_weight=sample_weight,
                normalize=self.normalize,
                label_offset=self.label_offset,
                exchange="ring" if self.dist_impl in ("bidir", "shift") else "gather",
                for_ddp=False,
            )
            loss = of_this_rank(rows, sample_weight, self.reduction)
        return {"contrastive_loss": loss} if output_dict else loss


class InfoNCELoss(LossModule):
    """Module of `fastloss.functional.info_nce`.

    Called with queries, positive and negative keys, and by keyword the queries' weights; `temperature` there
    replaces that of the constructor for this call.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        normalize: bool = True,
        label_offset: int = 0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode
        self.normalize = normalize
        self.label_offset = label_offset

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return F.info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature if temperature is None else temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
            sample_weight=sample_weight,
            normalize=self.normalize,
            label_offset=self.label_offset,
        )
