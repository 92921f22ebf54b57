// Sums over pairs and triples of rows: a warp for each row, a lane for every 32nd feature; lanes are added
// in a tree.
#include "../../losses/feature_sums.h"
#include "../launch.cuh"
#include "../launchers.h"
#include "../reduce.cuh"

namespace fastloss::cuda {
namespace {

constexpr int kFeatureThreads = 128;

template <class T, int kOthers>
__global__ void __launch_bounds__(kFeatureThreads) features_kernel(FeatureArgs args) {
  using R = acc_t<T>;
  const int64_t row = (int64_t{blockIdx.x} * kFeatureThreads + threadIdx.x) / 32;
  if (row >= args.rows) return;  // whole warps
  const int lane = threadIdx.x % 32;
  const int64_t begin = row * args.n;
  const T* a = static_cast<const T*>(args.a) + begin;
  const T* b[kOthers];
#pragma unroll
  for (int o = 0; o < kOthers; ++o) b[o] = static_cast<const T*>(args.other[o]) + begin;
  const R eps = static_cast<R>(args.eps);
  if (args.sums) {
    R sums[kOthers][kFeatureSums] = {};
    for (int64_t j = lane; j < args.n; j += 32) {
      const R x = widen(a[j]);
#pragma unroll
      for (int o = 0; o < kOthers; ++o) {
        const R y = widen(b[o][j]), d = x - y + eps;
        add_feature(sums[o], x, y, d);
      }
    }
#pragma unroll
    for (int o = 0; o < kOthers; ++o)
#pragma unroll
      for (int k = 0; k < kFeatureSums; ++k) {
        const R sum = warp_sum(sums[o][k]);
        if (lane == 0) static_cast<R*>(args.sums)[(o * kFeatureSums + k) * args.rows + row] = sum;
      }
    return;
  }
  const R* const grad = static_cast<const R*>(args.grad) + row;
  FeatureGradient<R> g[kOthers];
  R of_a = 0;
#pragma unroll
  for (int o = 0; o < kOthers; ++o) {
    g[o] = {grad + o * kFeatureSums * args.rows, args.rows};
    of_a += g[o].aa;
  }
  for (int64_t j = lane; j < args.n; j += 32) {
    const R x = widen(a[j]);
    R dx = scaled(of_a, x);
#pragma unroll
    for (int o = 0; o < kOthers; ++o) {
      const R y = widen(b[o][j]), dy = g[o].by_other(x, y, x - y + eps, dx);
      static_cast<T*>(args.d_other[o])[begin + j] = narrow<T>(dy);
    }
    static_cast<T*>(args.da)[begin + j] = narrow<T>(dx);
  }
}

template <class T>
void run(const FeatureArgs& args, cudaStream_t stream) {
  const int64_t blocks = (args.rows * 32 + kFeatureThreads - 1) / kFeatureThreads;
  args.others == 1 ? launch_1d<&features_kernel<T, 1>>(blocks, kFeatureThreads, 0, stream, args)
                   : launch_1d<&features_kernel<T, 2>>(blocks, kFeatureThreads, 0, stream, args);
}

}  // namespace

void feature_pairs(const FeatureArgs& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  with_device_type(args.dtype, [&]<class T> { run<T>(args, s); });
}

}  // namespace fastloss::cuda
