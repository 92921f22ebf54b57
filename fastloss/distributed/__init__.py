"""Losses over several processes (`torch.distributed`), with the values and gradients of one process.

Of a vocabulary each rank holds a slice of the classes (`vocabulary`); of a batch, some of its rows (`image_text`,
`contrastive`).
"""

from fastloss.distributed.collectives import all_gather, sum_of_gradients
from fastloss.distributed.contrastive import (
    info_nce,
    multiple_negatives_ranking_loss,
    nt_xent_loss,
    sup_con_loss,
)
from fastloss.distributed.image_text import clip_loss, siglip_loss
from fastloss.distributed.vocabulary import cross_entropy, linear_cross_entropy

__all__ = [
    "all_gather",
    "clip_loss",
    "cross_entropy",
    "info_nce",
    "linear_cross_entropy",
    "multiple_negatives_ranking_loss",
    "nt_xent_loss",
    "siglip_loss",
    "sum_of_gradients",
    "sup_con_loss",
]
