// The CPU's kernels of alignments, for one instruction set each.
#pragma once
#include "../../losses/ctc_args.h"

namespace fastloss::cpu {

using AlignmentKernel = void (*)(const AlignmentArgs& args, int64_t begin, int64_t end);  // sequences
extern const AlignmentKernel alignment_sse2, alignment_avx2, alignment_avx512;
AlignmentKernel alignment_kernel();

}  // namespace fastloss::cpu
