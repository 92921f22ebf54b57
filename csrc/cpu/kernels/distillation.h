// The CPU kernels of the divergences, for the instruction set that this machine has.
#pragma once
#include "../../losses/distillation.h"

namespace fastloss::cpu {

using DivergenceKernel = void (*)(const DivergenceArgs& args, int64_t begin, int64_t end);
extern const DivergenceKernel divergence_sse2, divergence_avx2, divergence_avx512;
DivergenceKernel divergence_kernel();

}  // namespace fastloss::cpu
