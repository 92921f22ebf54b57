// The CPU's kernels for pairs of rows, for one instruction set each.
#pragma once
#include "../../losses/feature_sums.h"
#include "../dispatch.h"

namespace fastloss::cpu {

using FeatureKernel = void (*)(const FeatureArgs& args, int64_t begin, int64_t end);  // rows
FASTLOSS_PER_ISA(FeatureKernel, feature_kernel)

}  // namespace fastloss::cpu
