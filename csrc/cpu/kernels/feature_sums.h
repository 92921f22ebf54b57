// The CPU's kernels for pairs of rows, for one instruction set each.
#pragma once
#include "../../losses/feature_sums_args.h"

namespace fastloss::cpu {

using FeatureKernel = void (*)(const FeatureArgs& args, int64_t begin, int64_t end);  // rows
extern const FeatureKernel features_sse2, features_avx2, features_avx512;
FeatureKernel feature_kernel();

}  // namespace fastloss::cpu
