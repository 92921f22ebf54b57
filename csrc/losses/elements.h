// All losses of the elements driver, family by family.
#pragma once
#include "pointwise.h"

#define FASTLOSS_ELEMENT_LOSSES(X) FASTLOSS_POINTWISE_LOSSES(X)
