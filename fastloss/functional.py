"""The losses as functions, under the names that the field knows them by. Each family's file holds its own."""

from fastloss import (
    aggregate,
    alignment,
    contrastive,
    contrastive_labels,
    contrastive_ranking,
    divergence,
    flow,
    focal,
    linear,
    linear_statistics,
    margin,
    metric,
    number_token,
    pointwise,
    policy,
    preference,
    preference_dpo,
    ranking,
    regression,
    rewards,
    sequence,
    statistics,
    survival,
    token,
    triplet_mining,
)
from fastloss.aggregate import *  # noqa: F403
from fastloss.alignment import *  # noqa: F403
from fastloss.contrastive import *  # noqa: F403
from fastloss.contrastive_labels import *  # noqa: F403
from fastloss.contrastive_ranking import *  # noqa: F403
from fastloss.divergence import *  # noqa: F403
from fastloss.flow import *  # noqa: F403
from fastloss.focal import *  # noqa: F403
from fastloss.linear import *  # noqa: F403
from fastloss.linear_statistics import *  # noqa: F403
from fastloss.margin import *  # noqa: F403
from fastloss.metric import *  # noqa: F403
from fastloss.number_token import *  # noqa: F403
from fastloss.pointwise import *  # noqa: F403
from fastloss.policy import *  # noqa: F403
from fastloss.preference import *  # noqa: F403
from fastloss.preference_dpo import *  # noqa: F403
from fastloss.ranking import *  # noqa: F403
from fastloss.regression import *  # noqa: F403
from fastloss.rewards import *  # noqa: F403
from fastloss.sequence import *  # noqa: F403
from fastloss.statistics import *  # noqa: F403
from fastloss.survival import *  # noqa: F403
from fastloss.token import *  # noqa: F403
from fastloss.triplet_mining import *  # noqa: F403

__all__ = [
    name
    for family in (
        token,
        focal,
        statistics,
        divergence,
        number_token,
        pointwise,
        regression,
        preference_dpo,
        preference,
        ranking,
        policy,
        flow,
        rewards,
        sequence,
        survival,
        alignment,
        linear,
        contrastive,
        contrastive_labels,
        contrastive_ranking,
        linear_statistics,
        margin,
        metric,
        triplet_mining,
        aggregate,
    )
    for name in family.__all__
]
