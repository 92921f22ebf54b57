// Losses of rankings: a warp for each row, a lane for each item, which it compares with all others of the
// row.
#include "../../losses/reward_model.h"
#include "../launch.cuh"
#include "../launchers.h"
#include "../reduce.cuh"

namespace fastloss::cuda {
namespace {

constexpr int kRankingThreads = 128;

template <class T>
struct DeviceRow {
  using R = acc_t<T>;
  const T* rewards;
  const R *ranks, *normalizers;
  __device__ __forceinline__ R reward(int64_t j) const { return widen(rewards[j]); }
  __device__ __forceinline__ R rank(int64_t j) const { return ranks[j]; }
  __device__ __forceinline__ R normalizer(int64_t j) const { return normalizers[j]; }
};

template <class T>
__global__ void __launch_bounds__(kRankingThreads, 4) ranking_kernel(RankingArgs a) {
  using R = acc_t<T>;
  const int64_t r = (int64_t{blockIdx.x} * kRankingThreads + threadIdx.x) / 32, n = a.n;
  if (r >= a.rows) return;  // whole warps
  const int64_t width = a.state_width();
  const bool chooses = a.kind == Ranking::plackett_luce;
  R* const state = static_cast<R*>(a.state) + r * width;
  const DeviceRow<T> row{static_cast<const T*>(a.rewards) + r * n, static_cast<const R*>(a.ranks) + r * n,
                         state};
  if (a.backward) {
    const R g = static_cast<const R*>(a.upstream)[r] * loss_weight(a.kind, state[width - 1]);
    for (int64_t i = threadIdx.x % 32; i < n; i += 32) {
      const R d = chooses ? choice_gradient<R>(row, n, i) : pairs_gradient<R>(row, n, i);
      static_cast<T*>(a.gradient)[r * n + i] = narrow<T>(g * d);
    }
    return;
  }
  R sums[2] = {0, 0}, &value = sums[0], &pairs = sums[1];
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) {
    const RankedItem<R> item = chooses ? choice_of_item<R>(row, n, i) : pairs_of_item<R>(row, n, i);
    if (chooses) state[i] = item.value;
    value += item.value;
    pairs += item.pairs;
  }
  warp_reduce_all(sums, Sum{});
  if (threadIdx.x % 32 != 0) return;
  static_cast<R*>(a.loss)[r] = value * loss_weight(a.kind, pairs);
  static_cast<R*>(a.pairs)[r] = pairs;
  state[width - 1] = pairs;
}

template <class T>
void run(const RankingArgs& a, cudaStream_t stream) {
  constexpr int kRows = kRankingThreads / 32;
  const int64_t blocks = (a.rows + kRows - 1) / kRows;
  launch_1d<&ranking_kernel<T>>(blocks, kRankingThreads, 0, stream, a);
}

}  // namespace

void ranking(const RankingArgs& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  with_device_type(args.dtype, [&]<class T> { run<T>(args, s); });
}

}  // namespace fastloss::cuda
