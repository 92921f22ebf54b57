// The CPU's kernel of rankings.
#pragma once
#include "../../losses/reward_model.h"
#include "../dispatch.h"

namespace fastloss::cpu {

using RankingKernel = void (*)(const RankingArgs& args, int64_t begin, int64_t end);  // rows
FASTLOSS_PER_ISA(RankingKernel, ranking_kernel)

}  // namespace fastloss::cpu
