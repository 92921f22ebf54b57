"""Every loss in plain PyTorch, written from its formula: slow, readable, differentiable any number of times."""

from fastloss.reference.advantages import *  # noqa: F403
from fastloss.reference.aggregation import *  # noqa: F403
from fastloss.reference.angular_margin import *  # noqa: F403
from fastloss.reference.classification import *  # noqa: F403
from fastloss.reference.contrastive import *  # noqa: F403
from fastloss.reference.ctc import *  # noqa: F403
from fastloss.reference.distillation import *  # noqa: F403
from fastloss.reference.dpo import *  # noqa: F403
from fastloss.reference.elementwise import *  # noqa: F403
from fastloss.reference.gflownet import *  # noqa: F403
from fastloss.reference.linear import *  # noqa: F403
from fastloss.reference.metric_learning import *  # noqa: F403
from fastloss.reference.number_token import *  # noqa: F403
from fastloss.reference.policy import *  # noqa: F403
from fastloss.reference.preference import *  # noqa: F403
from fastloss.reference.retrieval import *  # noqa: F403
from fastloss.reference.returns import *  # noqa: F403
from fastloss.reference.reward_model import *  # noqa: F403
from fastloss.reference.supervised_contrastive import *  # noqa: F403
from fastloss.reference.survival import *  # noqa: F403
from fastloss.reference.token_statistics import *  # noqa: F403
