// Sums over pairs of rows: a warp a row, each lane every 32nd feature, added up in a tree.
#include "start.cuh"
// after vector.cuh: port.cuh decides what __device__ means
#include "launchers.h"

namespace fastloss::cuda {
namespace {

constexpr int kFeatureThreads = 128;

template <class T>
__global__ void __launch_bounds__(kFeatureThreads) features_kernel(FeatureArgs args) {
  using R = acc_t<T>;
  const int64_t row = (int64_t{blockIdx.x} * kFeatureThreads + threadIdx.x) / 32;
  if (row >= args.rows) return;  // whole warps
  const int lane = threadIdx.x % 32;
  const T *a = static_cast<const T*>(args.a) + row * args.n,
          *b = static_cast<const T*>(args.b) + row * args.n;
  const R eps = static_cast<R>(args.eps);
  if (args.sums) {
    R sums[kFeatureSums] = {};
    for (int64_t j = lane; j < args.n; j += 32) {
      const R x = widen(a[j]), y = widen(b[j]), d = x - y + eps;
      sums[0] += x * y;
      sums[1] += x * x;
      sums[2] += y * y;
      sums[3] += d * d;
    }
#pragma unroll
    for (int k = 0; k < kFeatureSums; ++k) {
#pragma unroll
      for (int offset = 16; offset; offset /= 2) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], offset);
      if (lane == 0) static_cast<R*>(args.sums)[k * args.rows + row] = sums[k];
    }
    return;
  }
  T *da = static_cast<T*>(args.da) + row * args.n, *db = static_cast<T*>(args.db) + row * args.n;
  R g[kFeatureSums];
#pragma unroll
  for (int k = 0; k < kFeatureSums; ++k)
    g[k] = (k ? 2 : 1) * static_cast<const R*>(args.grad)[k * args.rows + row];
  for (int64_t j = lane; j < args.n; j += 32) {
    const R x = widen(a[j]), y = widen(b[j]), d = (x - y + eps) * g[3];
    da[j] = narrow<T>(y * g[0] + x * g[1] + d);
    db[j] = narrow<T>(x * g[0] + y * g[2] - d);
  }
}

template <class T>
void run(const FeatureArgs& args, cudaStream_t stream) {
  const int64_t blocks = (args.rows * 32 + kFeatureThreads - 1) / kFeatureThreads;
  start<&features_kernel<T>>(blocks, kFeatureThreads, 0, stream, args);
}

}  // namespace

void feature_pairs(const FeatureArgs& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  with_device_type(args.dtype, [&]<class T> { run<T>(args, s); });
}

}  // namespace fastloss::cuda
