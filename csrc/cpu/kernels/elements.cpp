// The elementwise losses for one instruction set: compiled once for each, with FL_ISA naming it.
//
// One formula is compiled for several passes, which must agree bit for bit: so the compiler must not contract
// a * b + c to FMAs, which it might do in some of them only.
#pragma GCC optimize("fp-contract=off")
#include "elements.h"
#include "tables.h"

namespace fastloss::inline FL_ISA {
namespace {

template <template <class, int> class Loss, int kVariant = 0>
void run(const ElementArgs& a, int64_t begin, int64_t end) {
  if constexpr (kVariant < Loss<float, 0>::kVariants) {
    if (a.variant != kVariant) return run<Loss, kVariant + 1>(a, begin, end);
    with_type(a.dtype, [&]<class T> { run_elements<Loss, kVariant, T>(a, begin, end); });
  }
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
#define FASTLOSS_ENTRY(name, Loss) .name = &run<Loss>,
FASTLOSS_OF_ISA(ElementKernels, element_kernels) = {FASTLOSS_ELEMENT_LOSSES(FASTLOSS_ENTRY)};
}  // namespace fastloss::cpu
