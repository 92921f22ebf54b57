// The CPU's kernels of survival losses, for one instruction set each.
#pragma once
#include "../../losses/survival.h"
#include "../dispatch.h"

namespace fastloss::cpu {

using SurvivalKernel = void (*)(const SurvivalArgs& args, int64_t begin, int64_t end);  // rows
FASTLOSS_PER_ISA(SurvivalKernel, survival_kernel)

}  // namespace fastloss::cpu
