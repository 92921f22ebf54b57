// All losses of the elements driver, family by family.
#pragma once
#include "elementwise.h"
#include "policy.h"
#include "preference.h"

#define FASTLOSS_ELEMENT_LOSSES(X) \
  FASTLOSS_POINTWISE_LOSSES(X) FASTLOSS_PREFERENCE_LOSSES(X) FASTLOSS_POLICY_LOSSES(X)
