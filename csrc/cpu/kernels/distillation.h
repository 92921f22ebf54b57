// The CPU kernels of the divergences, for the instruction set that this machine has.
#pragma once
#include "../../losses/distillation.h"
#include "../dispatch.h"

namespace fastloss::cpu {

using DivergenceKernel = void (*)(const DivergenceArgs& args, int64_t begin, int64_t end);
FASTLOSS_PER_ISA(DivergenceKernel, divergence_kernel)

}  // namespace fastloss::cpu
