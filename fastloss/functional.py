"""All losses as functions, under their common names; each family has its own file in `fastloss.losses`."""

from fastloss.losses.advantages import *  # noqa: F403
from fastloss.losses.aggregation import *  # noqa: F403
from fastloss.losses.angular_margin import *  # noqa: F403
from fastloss.losses.classification import *  # noqa: F403
from fastloss.losses.contrastive import *  # noqa: F403
from fastloss.losses.ctc import *  # noqa: F403
from fastloss.losses.distillation import *  # noqa: F403
from fastloss.losses.dpo import *  # noqa: F403
from fastloss.losses.elementwise import *  # noqa: F403
from fastloss.losses.gflownet import *  # noqa: F403
from fastloss.losses.linear import *  # noqa: F403
from fastloss.losses.metric_learning import *  # noqa: F403
from fastloss.losses.number_token import *  # noqa: F403
from fastloss.losses.policy import *  # noqa: F403
from fastloss.losses.preference import *  # noqa: F403
from fastloss.losses.retrieval import *  # noqa: F403
from fastloss.losses.returns import *  # noqa: F403
from fastloss.losses.reward_model import *  # noqa: F403
from fastloss.losses.supervised_contrastive import *  # noqa: F403
from fastloss.losses.survival import *  # noqa: F403
from fastloss.losses.token_statistics import *  # noqa: F403
