// The CPU kernels of the losses that share a driver, one for each line of its list.
#pragma once
#include <cstdint>

#include "../../drivers/elements.h"
#include "../../drivers/rows.h"
#include "../../drivers/scan.h"
#include "../../losses/classification.h"
#include "../../losses/elementwise.h"
#include "../../losses/policy.h"
#include "../../losses/preference.h"
#include "../../losses/returns.h"
#include "../dispatch.h"

namespace fastloss::cpu {

#define FASTLOSS_FIELD(name, Loss) Kernel name;

struct RowKernels {
  using Kernel = void (*)(const RowArgs& args, int64_t begin, int64_t end);  // rows
  FASTLOSS_ROW_KERNELS(FASTLOSS_FIELD)
};
FASTLOSS_PER_ISA(RowKernels, row_kernels)

struct ScanKernels {
  using Kernel = void (*)(const ScanArgs& args, int64_t begin, int64_t end);  // rows
  FASTLOSS_SCANS(FASTLOSS_FIELD)
};
FASTLOSS_PER_ISA(ScanKernels, scan_kernels)

struct ElementKernels {
  using Kernel = void (*)(const ElementArgs& args, int64_t begin, int64_t end);  // blocks of kElementBlock
  FASTLOSS_ELEMENT_LOSSES(FASTLOSS_FIELD)
};
FASTLOSS_PER_ISA(ElementKernels, element_kernels)

#undef FASTLOSS_FIELD

}  // namespace fastloss::cpu
