// Launchers of the token losses, and the two small kernels around a reduction over rows.
#include "launchers.h"
#include "rows.cuh"

namespace fastloss::cuda {
namespace {

template <template <class, int> class Loss, int kVariant>
void run_dtype(const RowArgs& a, cudaStream_t stream) {
  with_device_type(a.dtype, [&]<class T> { launch_rows<Loss<acc_t<T>, kVariant>, T>(a, stream); });
}
template <template <class, int> class Loss, int kVariant = 0>
void run(const RowArgs& a, cudaStream_t stream) {
  if constexpr (kVariant < Loss<float, 0>::kVariants) {
    if (a.variant == kVariant) return run_dtype<Loss, kVariant>(a, stream);
    run<Loss, kVariant + 1>(a, stream);
  }
}

// One block adds up `value(r)` over the rows, in double and in an order that depends on their number alone.
constexpr int kSumThreads = 1024;
template <class F>
__device__ __forceinline__ double sum_of_rows(int64_t rows, F value) {
  double sum = 0;
  for (int64_t r = threadIdx.x; r < rows; r += kSumThreads) sum += value(r);
  return sum_of_block<kSumThreads>(sum);
}

template <class R>
__global__ void __launch_bounds__(kSumThreads) norm_kernel(RowArgs a, R* out) {
  const double sum = sum_of_rows(a.rows, [&](int64_t r) {
    const int64_t t = a.target ? a.target[r] : 0;
    if (a.target && t == a.ignore_index) return 0.0;
    const bool inside = t >= 0 && t < a.n;
    const double w = a.target && a.class_weight && !a.norm_counts_rows && inside
                         ? double(static_cast<const R*>(a.class_weight)[t])
                         : 1.0;
    return w * (a.row_weight ? double(static_cast<const R*>(a.row_weight)[r]) : 1.0);
  });
  if (threadIdx.x == 0) *out = static_cast<R>(sum);
}
template <class R>
__global__ void __launch_bounds__(kSumThreads) reduce_kernel(RowArgs a, R* out) {
  const double sum = sum_of_rows(a.rows, [&](int64_t r) { return double(static_cast<const R*>(a.loss)[r]); });
  if (threadIdx.x == 0) *out = static_cast<R>(a.norm ? sum / double(*static_cast<const R*>(a.norm)) : sum);
}

}  // namespace

void row_norm(const RowArgs& a, void* norm, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::f64)
    return start<&norm_kernel<double>>(1, kSumThreads, 0, s, a, static_cast<double*>(norm));
  start<&norm_kernel<float>>(1, kSumThreads, 0, s, a, static_cast<float*>(norm));
}
void row_reduce(const RowArgs& a, void* out, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::f64)
    return start<&reduce_kernel<double>>(1, kSumThreads, 0, s, a, static_cast<double*>(out));
  start<&reduce_kernel<float>>(1, kSumThreads, 0, s, a, static_cast<float*>(out));
}
#define FASTLOSS_LAUNCH(name, Loss) \
  void name(const RowArgs& args, void* stream) { run<Loss>(args, static_cast<cudaStream_t>(stream)); }
FASTLOSS_ROW_KERNELS(FASTLOSS_LAUNCH)

}  // namespace fastloss::cuda
