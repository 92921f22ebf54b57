// The operators of this build know only the CUDA kernels.
#include <stdexcept>

#include "cpu/dispatch.h"

namespace fastloss::cpu {

const Kernels& kernels() { throw std::logic_error("the CPU kernels are not part of this build"); }
const ScanKernels& scan_kernels() { throw std::logic_error("the CPU kernels are not part of this build"); }
const ElementKernels& element_kernels() {
  throw std::logic_error("the CPU kernels are not part of this build");
}

RankingKernel ranking_kernel() { throw std::logic_error("the CPU kernels are not part of this build"); }

}  // namespace fastloss::cpu
