// Launchers of the elementwise losses.
#include "../launchers.h"
#include "elements.cuh"

namespace fastloss::cuda {
namespace {

template <template <class, int> class Loss, int kVariant = 0>
void run(const ElementArgs& a, cudaStream_t stream) {
  if constexpr (kVariant < Loss<float, 0>::kVariants) {
    if (a.variant != kVariant) return run<Loss, kVariant + 1>(a, stream);
    with_device_type(a.dtype, [&]<class T> { launch_elements<Loss<acc_t<T>, kVariant>, T>(a, stream); });
  }
}

constexpr int kScaleBlocks = 1024;  // enough for every GPU, few enough to cost nothing where the factor is 1

template <class T>
__global__ void __launch_bounds__(kElementThreads) scale_kernel(ScaleArgs a) {
  using R = acc_t<T>;
  const R factor = *static_cast<const R*>(a.factor);
  if (factor == 1) return;
  constexpr int N = Vec<T>::kSize;
  T* const p = static_cast<T*>(a.p);
  const int64_t vectors = aligned(p) ? a.n / N : 0, threads = int64_t{gridDim.x} * kElementThreads;
  const int64_t first = int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  for (int64_t i = first; i < vectors; i += threads) {
    Vec<T> v = load16(p + i * N);
#pragma unroll
    for (int e = 0; e < N; ++e) v.v[e] = narrow<T>(widen(v.v[e]) * factor);
    store16(p + i * N, v);
  }
  for (int64_t i = vectors * N + first; i < a.n; i += threads) p[i] = narrow<T>(widen(p[i]) * factor);
}

}  // namespace

void scale(const ScaleArgs& a, void* stream) {
  with_device_type(a.dtype, [&]<class T> {
    const int64_t blocks = (a.n + kElementThreads * Vec<T>::kSize - 1) / (kElementThreads * Vec<T>::kSize);
    launch_1d<&scale_kernel<T>>(blocks < kScaleBlocks ? blocks : kScaleBlocks, kElementThreads, 0,
                                static_cast<cudaStream_t>(stream), a);
  });
}
int64_t element_partials(DType dtype, int64_t n) {
  if (dtype == DType::f64) return tiles<double>(n);
  return dtype == DType::f32 ? tiles<float>(n) : tiles<__half>(n);
}
#define FASTLOSS_LAUNCH(name, Loss) \
  void name(const ElementArgs& args, void* stream) { run<Loss>(args, static_cast<cudaStream_t>(stream)); }
FASTLOSS_ELEMENT_LOSSES(FASTLOSS_LAUNCH)

}  // namespace fastloss::cuda
