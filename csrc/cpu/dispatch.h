// The CPU kernels of every instruction set that was compiled, and the choice among them.
#pragma once
#include <cstdint>

#include "../drivers/elements.h"
#include "../drivers/rows.h"
#include "../drivers/scan.h"
#include "../losses/classification.h"
#include "../losses/elements.h"
#include "../losses/returns.h"
#include "../losses/reward_model_args.h"
#include "../math/visibility.h"

namespace fastloss::cpu {

using RowKernel = void (*)(const RowArgs& args, int64_t begin, int64_t end);

struct Kernels {
#define FASTLOSS_FIELD(name, Loss) RowKernel name;
  FASTLOSS_ROW_KERNELS(FASTLOSS_FIELD)
#undef FASTLOSS_FIELD
};

using ScanKernel = void (*)(const ScanArgs& args, int64_t begin, int64_t end);

struct ScanKernels {
#define FASTLOSS_FIELD(name, Loss) ScanKernel name;
  FASTLOSS_SCANS(FASTLOSS_FIELD)
#undef FASTLOSS_FIELD
};

// Blocks begin, ..., end - 1 of kElementBlock elements.
using ElementKernel = void (*)(const ElementArgs& args, int64_t begin, int64_t end);

struct ElementKernels {
#define FASTLOSS_FIELD(name, Loss) ElementKernel name;
  FASTLOSS_ELEMENT_LOSSES(FASTLOSS_FIELD)
#undef FASTLOSS_FIELD
};

// Rows begin, ..., end - 1.
using RankingKernel = void (*)(const RankingArgs& args, int64_t begin, int64_t end);

extern const Kernels kernels_sse2, kernels_avx2, kernels_avx512;
extern const ScanKernels scans_sse2, scans_avx2, scans_avx512;
extern const ElementKernels elements_sse2, elements_avx2, elements_avx512;
extern const RankingKernel ranking_sse2, ranking_avx2, ranking_avx512;

// Chosen once: the best that this machine has, or less if FASTLOSS_CPU_CAPABILITY asks for it.
const Kernels& kernels();
const ScanKernels& scan_kernels();
const ElementKernels& element_kernels();
RankingKernel ranking_kernel();
FASTLOSS_EXPORT const char* capability();
FASTLOSS_EXPORT const char* linear_capability();  // of matrix products: also "amx"

}  // namespace fastloss::cpu
