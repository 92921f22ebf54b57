// The recursions in time for one instruction set: compiled once for each, with FL_ISA naming it.
#include "scan.h"
// after scan.h: the vector overloads must be known where the losses are defined
#include "../losses/sequence.h"
#include "dispatch.h"

namespace fastloss::inline FL_ISA {
namespace {

template <template <class> class Loss>
void run(const ScanArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32:
      return ScanWalker<Loss<float>, float>(a).run(begin, end);
    case DType::bf16:
      return ScanWalker<Loss<float>, BFloat16>(a).run(begin, end);
    case DType::f16:
      return ScanWalker<Loss<float>, Half>(a).run(begin, end);
    case DType::f64:
      return ScanWalker<Loss<double>, double>(a).run(begin, end);
  }
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

#define FASTLOSS_JOIN_(a, b) a##b
#define FASTLOSS_JOIN(a, b) FASTLOSS_JOIN_(a, b)

namespace fastloss::cpu {
#define FASTLOSS_ENTRY(name, Loss) .name = &run<Loss>,
const ScanKernels FASTLOSS_JOIN(scans_, FL_ISA) = {FASTLOSS_SCANS(FASTLOSS_ENTRY)};
}  // namespace fastloss::cpu
