"""The losses as functions, under the names that the field knows them by. Each family's file holds its own."""

from fastloss.losses import (
    aggregation,
    angular_margin,
    classification,
    contrastive,
    ctc,
    distillation,
    dpo,
    elementwise,
    focal,
    gflownet,
    linear,
    linear_token_statistics,
    metric_learning,
    number_token,
    pointwise,
    policy,
    preference,
    retrieval,
    returns,
    reward_model,
    rewards,
    supervised_contrastive,
    survival,
    token_statistics,
    triplet_mining,
)
from fastloss.losses.aggregation import *  # noqa: F403
from fastloss.losses.angular_margin import *  # noqa: F403
from fastloss.losses.classification import *  # noqa: F403
from fastloss.losses.contrastive import *  # noqa: F403
from fastloss.losses.ctc import *  # noqa: F403
from fastloss.losses.distillation import *  # noqa: F403
from fastloss.losses.dpo import *  # noqa: F403
from fastloss.losses.elementwise import *  # noqa: F403
from fastloss.losses.focal import *  # noqa: F403
from fastloss.losses.gflownet import *  # noqa: F403
from fastloss.losses.linear import *  # noqa: F403
from fastloss.losses.linear_token_statistics import *  # noqa: F403
from fastloss.losses.metric_learning import *  # noqa: F403
from fastloss.losses.number_token import *  # noqa: F403
from fastloss.losses.pointwise import *  # noqa: F403
from fastloss.losses.policy import *  # noqa: F403
from fastloss.losses.preference import *  # noqa: F403
from fastloss.losses.retrieval import *  # noqa: F403
from fastloss.losses.returns import *  # noqa: F403
from fastloss.losses.reward_model import *  # noqa: F403
from fastloss.losses.rewards import *  # noqa: F403
from fastloss.losses.supervised_contrastive import *  # noqa: F403
from fastloss.losses.survival import *  # noqa: F403
from fastloss.losses.token_statistics import *  # noqa: F403
from fastloss.losses.triplet_mining import *  # noqa: F403

__all__ = [
    name
    for family in (
        classification,
        focal,
        token_statistics,
        distillation,
        number_token,
        pointwise,
        elementwise,
        dpo,
        preference,
        reward_model,
        policy,
        gflownet,
        rewards,
        returns,
        survival,
        ctc,
        linear,
        contrastive,
        supervised_contrastive,
        retrieval,
        linear_token_statistics,
        angular_margin,
        metric_learning,
        triplet_mining,
        aggregation,
    )
    for name in family.__all__
]
