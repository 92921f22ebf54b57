// Launchers of the recursions in time.
#include "../../losses/returns.h"
#include "../launchers.h"
#include "scan.cuh"

namespace fastloss::cuda {
namespace {

template <class Loss, class T>
void run_pass(const ScanArgs& a, cudaStream_t stream) {
  if constexpr (Loss::kBackward)
    if (a.backward) return launch_scan<Loss, T, true>(a, stream);
  launch_scan<Loss, T, false>(a, stream);
}
template <template <class> class Loss>
void run(const ScanArgs& a, cudaStream_t stream) {
  with_device_type(a.dtype, [&]<class T> { run_pass<Loss<acc_t<T>>, T>(a, stream); });
}

}  // namespace

#define FASTLOSS_LAUNCH(name, Loss) \
  void name(const ScanArgs& args, void* stream) { run<Loss>(args, static_cast<cudaStream_t>(stream)); }
FASTLOSS_SCANS(FASTLOSS_LAUNCH)

}  // namespace fastloss::cuda
