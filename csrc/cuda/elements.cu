// Launchers of the elementwise losses.
#include "elements.cuh"
#include "launchers.h"

namespace fastloss::cuda {
namespace {

template <template <class, int> class Loss, int kVariant = 0>
void run(const ElementArgs& a, cudaStream_t stream) {
  if constexpr (kVariant < Loss<float, 0>::kVariants) {
    if (a.variant != kVariant) return run<Loss, kVariant + 1>(a, stream);
    with_device_type(a.dtype, [&]<class T> { launch_elements<Loss<acc_t<T>, kVariant>, T>(a, stream); });
  }
}

}  // namespace

int64_t element_partials(DType dtype, int64_t n) {
  if (dtype == DType::f64) return tiles<double>(n);
  return dtype == DType::f32 ? tiles<float>(n) : tiles<__half>(n);
}
#define FASTLOSS_LAUNCH(name, Loss) \
  void name(const ElementArgs& args, void* stream) { run<Loss>(args, static_cast<cudaStream_t>(stream)); }
FASTLOSS_ELEMENT_LOSSES(FASTLOSS_LAUNCH)

}  // namespace fastloss::cuda
