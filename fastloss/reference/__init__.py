"""Every loss in plain PyTorch, written from its formula: slow, readable, differentiable any number of times."""

from fastloss.reference import (
    aggregation,
    angular_margin,
    classification,
    contrastive,
    ctc,
    distillation,
    elementwise,
    focal,
    gflownet,
    linear,
    metric_learning,
    number_token,
    pointwise,
    policy,
    preference,
    returns,
    reward_model,
    rewards,
    survival,
    token_statistics,
)
from fastloss.reference.aggregation import *  # noqa: F403
from fastloss.reference.angular_margin import *  # noqa: F403
from fastloss.reference.classification import *  # noqa: F403
from fastloss.reference.contrastive import *  # noqa: F403
from fastloss.reference.ctc import *  # noqa: F403
from fastloss.reference.distillation import *  # noqa: F403
from fastloss.reference.elementwise import *  # noqa: F403
from fastloss.reference.focal import *  # noqa: F403
from fastloss.reference.gflownet import *  # noqa: F403
from fastloss.reference.linear import *  # noqa: F403
from fastloss.reference.metric_learning import *  # noqa: F403
from fastloss.reference.number_token import *  # noqa: F403
from fastloss.reference.pointwise import *  # noqa: F403
from fastloss.reference.policy import *  # noqa: F403
from fastloss.reference.preference import *  # noqa: F403
from fastloss.reference.returns import *  # noqa: F403
from fastloss.reference.reward_model import *  # noqa: F403
from fastloss.reference.rewards import *  # noqa: F403
from fastloss.reference.survival import *  # noqa: F403
from fastloss.reference.token_statistics import *  # noqa: F403

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
        angular_margin,
        metric_learning,
        aggregation,
    )
    for name in family.__all__
]
