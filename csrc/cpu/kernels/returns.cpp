// The recursions in time for one instruction set: compiled once for each, with FL_ISA naming it.
#include "scan.h"
// after scan.h: the vector overloads must be known where the losses are defined
#include "../../losses/returns.h"
#include "../dispatch.h"

namespace fastloss::inline FL_ISA {
namespace {

template <template <class> class Loss>
void run(const ScanArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T> { ScanWalker<Loss<acc_t<T>>, T>(a).run(begin, end); });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

#define FASTLOSS_JOIN_(a, b) a##b
#define FASTLOSS_JOIN(a, b) FASTLOSS_JOIN_(a, b)

namespace fastloss::cpu {
#define FASTLOSS_ENTRY(name, Loss) .name = &run<Loss>,
const ScanKernels FASTLOSS_JOIN(scans_, FL_ISA) = {FASTLOSS_SCANS(FASTLOSS_ENTRY)};
}  // namespace fastloss::cpu
