// The CPU's kernels of alignments, for one instruction set each.
#pragma once
#include "../../losses/ctc.h"
#include "../dispatch.h"

namespace fastloss::cpu {

using AlignmentKernel = void (*)(const AlignmentArgs& args, int64_t begin, int64_t end);  // sequences
FASTLOSS_PER_ISA(AlignmentKernel, alignment_kernel)

}  // namespace fastloss::cpu
