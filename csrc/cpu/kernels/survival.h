// The CPU's kernels of survival losses, for one instruction set each.
#pragma once
#include "../../losses/survival_args.h"

namespace fastloss::cpu {

using SurvivalKernel = void (*)(const SurvivalArgs& args, int64_t begin, int64_t end);  // rows
extern const SurvivalKernel survival_sse2, survival_avx2, survival_avx512;
SurvivalKernel survival_kernel();

}  // namespace fastloss::cpu
