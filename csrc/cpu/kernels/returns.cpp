// The recursions in time for one instruction set: compiled once for each, with FL_ISA naming it.
#include "../../losses/returns.h"
#include "scan.h"
#include "tables.h"

namespace fastloss::inline FL_ISA {
namespace {

template <template <class> class Loss>
void run(const ScanArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T> { ScanKernel<Loss<acc_t<T>>, T>(a).run(begin, end); });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
#define FASTLOSS_ENTRY(name, Loss) .name = &run<Loss>,
FASTLOSS_OF_ISA(ScanKernels, scan_kernels) = {FASTLOSS_SCANS(FASTLOSS_ENTRY)};
}  // namespace fastloss::cpu
