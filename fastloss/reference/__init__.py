"""Every loss in plain PyTorch, written from its formula: slow, readable, differentiable any number of times."""

from fastloss.reference import (
    aggregate,
    alignment,
    contrastive,
    divergence,
    flow,
    focal,
    linear,
    margin,
    metric,
    number_token,
    pointwise,
    policy,
    preference,
    ranking,
    regression,
    rewards,
    sequence,
    statistics,
    survival,
    token,
)
from fastloss.reference.aggregate import *  # noqa: F403
from fastloss.reference.alignment import *  # noqa: F403
from fastloss.reference.contrastive import *  # noqa: F403
from fastloss.reference.divergence import *  # noqa: F403
from fastloss.reference.flow import *  # noqa: F403
from fastloss.reference.focal import *  # noqa: F403
from fastloss.reference.linear import *  # noqa: F403
from fastloss.reference.margin import *  # noqa: F403
from fastloss.reference.metric import *  # noqa: F403
from fastloss.reference.number_token import *  # noqa: F403
from fastloss.reference.pointwise import *  # noqa: F403
from fastloss.reference.policy import *  # noqa: F403
from fastloss.reference.preference import *  # noqa: F403
from fastloss.reference.ranking import *  # noqa: F403
from fastloss.reference.regression import *  # noqa: F403
from fastloss.reference.rewards import *  # noqa: F403
from fastloss.reference.sequence import *  # noqa: F403
from fastloss.reference.statistics import *  # noqa: F403
from fastloss.reference.survival import *  # noqa: F403
from fastloss.reference.token import *  # noqa: F403

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
        margin,
        metric,
        aggregate,
    )
    for name in family.__all__
]
