"""The losses as functions, under the names that the field knows them by. Each family's file holds its own."""

from fastloss import focal, pointwise, policy, preference, sequence, token
from fastloss.focal import *  # noqa: F403
from fastloss.pointwise import *  # noqa: F403
from fastloss.policy import *  # noqa: F403
from fastloss.preference import *  # noqa: F403
from fastloss.sequence import *  # noqa: F403
from fastloss.token import *  # noqa: F403

__all__ = [name for family in (token, focal, pointwise, preference, policy, sequence) for name in family.__all__]
