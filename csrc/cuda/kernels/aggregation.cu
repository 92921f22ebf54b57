// Reductions of losses of samples. In each pass a block sums a tile of samples in registers, in a fixed
// order; one more block adds the tiles' sums and updates the state. If one tile holds all samples, a single
// block runs all passes in one launch. The gradient is elementwise.
#include "../../losses/aggregation.h"
#include "../launch.cuh"
#include "../launchers.h"
#include "../reduce.cuh"

namespace fastloss::cuda {
namespace {

constexpr int kAggregateThreads = 256, kAggregateWarps = kAggregateThreads / 32;
constexpr int64_t kAggregateTile = 4096;
constexpr int kTotals = kMaxSums + kMaxTops;

struct Widen {
  template <class T>
  __device__ __forceinline__ double operator()(T x) const {
    return widen(x);
  }
};

// kCount samples from i on; those of weight 0 and those beyond n are 0.
template <class T, int kCount>
struct Samples {
  using R = acc_t<T>;
  R x[kCount], w[kCount];
  __device__ __forceinline__ Samples(const AggregateArgs& a, int64_t i) {
    const T* p = static_cast<const T*>(a.losses) + i;
    const R* weight = static_cast<const R*>(a.weight);
    if (i + kCount <= a.n && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      const Vec<T> raw = load16(p);
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = widen(raw.v[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = i + k < a.n ? R(widen(p[k])) : R(0);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      w[k] = i + k < a.n ? (weight ? weight[i + k] : R(1)) : R(0);
      if (w[k] == 0) x[k] = 0;
    }
  }
};

struct SumOrMax {
  bool max_of;
  __device__ __forceinline__ double operator()(double mine, double other) const {
    return max_of ? Max{}(mine, other) : Sum{}(mine, other);
  }
};

// Sums and maxima of a tile, in totals[k] for k < kSums and from kMaxSums on. Ends with a barrier.
template <class T, class Pass>
__device__ __forceinline__ void sum_tile(const AggregateArgs& a, int64_t tile, double* totals) {
  using R = acc_t<T>;
  constexpr int N = Vec<T>::kSize, kAll = Pass::kSums + Pass::kTops;
  FL_SHARED(double, part, kAll* kAggregateWarps);
  const Pass pass(a, *a.state);
  R sums[Pass::kSums] = {}, tops[kMaxTops] = {-INFINITY, -INFINITY};
  const int64_t begin = tile * kAggregateTile, end = begin + kAggregateTile;
#pragma unroll 1
  for (int64_t i = begin + int64_t{threadIdx.x} * N; i < end && i < a.n; i += kAggregateThreads * N) {
    const Samples<T, N> samples(a, i);
#pragma unroll
    for (int k = 0; k < N; ++k) pass.add(samples.x[k], samples.w[k], sums, tops);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kAll; ++k) {
    const bool top = k >= Pass::kSums;
    double v =
        top ? double(tops[k >= Pass::kSums ? k - Pass::kSums : 0]) : double(sums[k < Pass::kSums ? k : 0]);
    v = warp_reduce(v, SumOrMax{top});
    if (lane == 0) part[k * kAggregateWarps + warp] = v;
  }
  __syncthreads();
  if (threadIdx.x < kAll) {
    const bool top = threadIdx.x >= Pass::kSums;
    double v = part[threadIdx.x * kAggregateWarps];
    for (int w = 1; w < kAggregateWarps; ++w) v = SumOrMax{top}(v, part[threadIdx.x * kAggregateWarps + w]);
    totals[top ? kMaxSums + threadIdx.x - Pass::kSums : threadIdx.x] = v;
  }
  __syncthreads();
}

// All passes, by one block over one tile. __launch_bounds__, here and below: without a minimum of blocks the
// compiler uses so few registers that it spills, and with a large one it spills too.
template <class T>
__global__ void __launch_bounds__(kAggregateThreads, 1) aggregate_kernel(AggregateArgs a) {
  FL_SHARED(double, totals, kTotals);
  for (int i = 0; i < a.passes; ++i) {
    with_pass<acc_t<T>>(a.plan[i], [&]<class Pass> {
      sum_tile<T, Pass>(a, 0, totals);
      if (threadIdx.x == 0) Pass::template finish<T>(a, totals, totals + kMaxSums, *a.state, Widen{});
    });
    __syncthreads();
  }
}

template <class T>
constexpr int kSumBlocks = sizeof(T) == 8 ? 1 : 2;

template <class T, class Pass>
__global__ void __launch_bounds__(kAggregateThreads, kSumBlocks<T>) aggregate_sum_kernel(AggregateArgs a) {
  FL_SHARED(double, totals, kTotals);
  sum_tile<T, Pass>(a, blockIdx.x, totals);
  constexpr int kAll = Pass::kSums + Pass::kTops;
  if (threadIdx.x >= kAll) return;
  const int k = threadIdx.x < Pass::kSums ? threadIdx.x : kMaxSums + threadIdx.x - Pass::kSums;
  a.partial[k * a.partials + blockIdx.x] = totals[k];
}

template <class T, class Pass>
__global__ void __launch_bounds__(kAggregateThreads) aggregate_finish_kernel(AggregateArgs a) {
  FL_SHARED(double, totals, kTotals);
  constexpr int kAll = Pass::kSums + Pass::kTops;
  for (int j = threadIdx.x / 32; j < kAll; j += kAggregateWarps) {
    const bool top = j >= Pass::kSums;
    const int k = top ? kMaxSums + j - Pass::kSums : j;
    double v = top ? -INFINITY : 0;
    for (int64_t p = threadIdx.x % 32; p < a.partials; p += 32)
      v = SumOrMax{top}(v, a.partial[k * a.partials + p]);
    v = warp_reduce(v, SumOrMax{top});
    if (threadIdx.x % 32 == 0) totals[k] = v;
  }
  __syncthreads();
  if (threadIdx.x == 0) Pass::template finish<T>(a, totals, totals + kMaxSums, *a.state, Widen{});
}

template <class T>
__global__ void __launch_bounds__(kAggregateThreads) aggregate_gradient_kernel(AggregateArgs a) {
  using R = acc_t<T>;
  constexpr int N = Vec<T>::kSize;
  const R upstream = *static_cast<const R*>(a.upstream);
  const AggregateGradient<R> slope(a, *a.state, upstream);
  T* const dx = static_cast<T*>(a.gradient);
  const int64_t i = (int64_t{blockIdx.x} * kAggregateThreads + threadIdx.x) * N;
  if (i == 0 && a.theta_gradient) *static_cast<R*>(a.theta_gradient) = R(a.state->theta_slope * upstream);
  if (i >= a.n) return;
  const Samples<T, N> samples(a, i);
  Vec<T> d;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const R w = samples.w[k];
    d.v[k] = narrow<T>(w == 0 ? R(0) : slope(samples.x[k]) * w);
  }
  if (i + N <= a.n && reinterpret_cast<uintptr_t>(dx + i) % 16 == 0) return store16(dx + i, d);
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (i + k < a.n) dx[i + k] = d.v[k];
}

template <class T>
void run(const AggregateArgs& a, cudaStream_t stream) {
  if (a.partials == 1) return launch_1d<&aggregate_kernel<T>>(1, kAggregateThreads, 0, stream, a);
  for (int i = 0; i < a.passes; ++i)
    with_pass<acc_t<T>>(a.plan[i], [&]<class Pass> {
      launch_1d<&aggregate_sum_kernel<T, Pass>>(a.partials, kAggregateThreads, 0, stream, a);
      launch_1d<&aggregate_finish_kernel<T, Pass>>(1, kAggregateThreads, 0, stream, a);
    });
}
template <class T>
void run_gradient(const AggregateArgs& a, cudaStream_t stream) {
  constexpr int64_t kSamples = int64_t{kAggregateThreads} * Vec<T>::kSize;
  const int64_t blocks = a.n ? (a.n + kSamples - 1) / kSamples : 1;  // for n = 0 theta's gradient remains
  launch_1d<&aggregate_gradient_kernel<T>>(blocks, kAggregateThreads, 0, stream, a);
}

}  // namespace

int64_t aggregate_partials(int64_t n) { return n ? (n + kAggregateTile - 1) / kAggregateTile : 1; }
void aggregate(const AggregateArgs& args, void* stream) {
  with_device_type(args.dtype, [&]<class T> { run<T>(args, static_cast<cudaStream_t>(stream)); });
}
void aggregate_gradient(const AggregateArgs& args, void* stream) {
  with_device_type(args.dtype, [&]<class T> { run_gradient<T>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace fastloss::cuda
