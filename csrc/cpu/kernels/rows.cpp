// The token losses for one instruction set: compiled once for each, with FL_ISA naming it.
#include "rows.h"
#include "tables.h"

namespace fastloss::inline FL_ISA {
namespace {

template <template <class, int> class Loss, int kVariant>
void run_dtype(const RowArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T> { run_rows<Loss<acc_t<T>, kVariant>, T>(a, begin, end); });
}

template <template <class, int> class Loss, int kVariant = 0>
void run(const RowArgs& a, int64_t begin, int64_t end) {
  if constexpr (kVariant < Loss<float, 0>::kVariants) {
    if (a.variant == kVariant) return run_dtype<Loss, kVariant>(a, begin, end);
    run<Loss, kVariant + 1>(a, begin, end);
  }
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
#define FASTLOSS_ENTRY(name, Loss) .name = &run<Loss>,
FASTLOSS_OF_ISA(RowKernels, row_kernels) = {FASTLOSS_ROW_KERNELS(FASTLOSS_ENTRY)};
}  // namespace fastloss::cpu
