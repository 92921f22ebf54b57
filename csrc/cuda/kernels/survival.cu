// Survival losses: scans along sorted cohorts (long_scan.cuh), then a thread for each place.
#include "../../losses/survival.h"
#include "../launch.cuh"
#include "../launchers.h"
#include "../reduce.cuh"
#include "long_scan.cuh"

namespace fastloss::cuda {
namespace {

constexpr int kThreads = kSurvivalThreads;

template <class T>
struct Score {
  const T* x;
  __device__ __forceinline__ double operator()(int64_t i) const { return widen(x[i]); }
};

// Blocks are numbered tile by tile, row by row.
struct Tile {
  int64_t row, first;
  __device__ __forceinline__ explicit Tile(const SurvivalArgs& a)
      : row(blockIdx.x / survival_tiles(a)),
        first(blockIdx.x % survival_tiles(a) * kSurvivalTile + int64_t{threadIdx.x} * kSurvivalSteps) {}
};

template <class Loss>
__device__ __forceinline__ auto read_item(const Loss& loss, int64_t p, typename Loss::Forward*) {
  return loss.forward(p);
}
template <class Loss>
__device__ __forceinline__ auto read_item(const Loss& loss, int64_t p, typename Loss::Back*) {
  return loss.back(p);
}

template <class Loss, class Item, class T>
__global__ void __launch_bounds__(kThreads, 2) sum_kernel(SurvivalArgs a) {
  const Tile tile(a);
  const Loss loss(a, tile.row, {static_cast<const T*>(a.score)});
  const auto read = [&](int64_t p) { return read_item(loss, p, static_cast<Item*>(nullptr)); };
  const Item sum = sum_of_tile<Item, kThreads, kSurvivalSteps>(tile.first, a.n, read);
  if (threadIdx.x == 0) reinterpret_cast<Item*>(a.items)[blockIdx.x] = sum;
}
template <class Item>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(SurvivalArgs a) {
  const int64_t tiles = survival_tiles(a);
  scan_sums<Item, kThreads>(reinterpret_cast<Item*>(a.items) + blockIdx.x * tiles, tiles);
}
template <class Loss, class Item, class T>
__global__ void __launch_bounds__(kThreads, 2) scan_kernel(SurvivalArgs a) {
  const Tile tile(a);
  const Loss loss(a, tile.row, {static_cast<const T*>(a.score)});
  const Item start = survival_tiles(a) > 1 ? reinterpret_cast<const Item*>(a.items)[blockIdx.x] : Item();
  const auto read = [&](int64_t p) { return read_item(loss, p, static_cast<Item*>(nullptr)); };
  const auto save = [&](int64_t p, const Item& s) { loss.save(p, s); };
  scan_tile<Item, kThreads, kSurvivalSteps>(tile.first, a.n, start, read, save);
}

template <class Loss, class T>
__global__ void __launch_bounds__(kThreads, 2) value_kernel(SurvivalArgs a) {
  const Tile tile(a);
  const Loss loss(a, tile.row, {static_cast<const T*>(a.score)});
  double sum = 0;
  for (int k = 0; k < kSurvivalSteps && tile.first + k < a.n; ++k) {
    const double v = loss.value(tile.first + k);
    sum += v;
    if (a.loss) a.loss[loss.individual(tile.first + k)] = v;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}
template <class Loss, class T>
__global__ void __launch_bounds__(kThreads, 2) gradient_kernel(SurvivalArgs a) {
  const Tile tile(a);
  const Loss loss(a, tile.row, {static_cast<const T*>(a.score)});
  for (int k = 0; k < kSurvivalSteps && tile.first + k < a.n; ++k)
    static_cast<T*>(a.gradient)[loss.individual(tile.first + k)] =
        narrow<T>(acc_t<T>(loss.gradient(tile.first + k)));
}
__global__ void __launch_bounds__(kThreads, 2) total_kernel(SurvivalArgs a) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < a.rows * survival_tiles(a); i += kThreads) sum += a.partial[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *a.total = sum;
}

template <class Loss, class Item, class T>
void scan(const SurvivalArgs& a, cudaStream_t stream) {
  static_assert(sizeof(Item) <= kSurvivalItem * sizeof(double) && sizeof(Item) % 8 == 0);
  const int64_t blocks = a.rows * survival_tiles(a);
  if (survival_tiles(a) > 1) {
    launch_1d<&sum_kernel<Loss, Item, T>>(blocks, kThreads, 0, stream, a);
    launch_1d<&sums_kernel<Item>>(a.rows, kThreads, 0, stream, a);
  }
  launch_1d<&scan_kernel<Loss, Item, T>>(blocks, kThreads, 0, stream, a);
}
template <class Loss, class T>
void run_loss(const SurvivalArgs& a, cudaStream_t stream) {
  const int64_t blocks = a.rows * survival_tiles(a);
  if (a.backward) {
    scan<Loss, typename Loss::Back, T>(a, stream);
    return launch_1d<&gradient_kernel<Loss, T>>(blocks, kThreads, 0, stream, a);
  }
  scan<Loss, typename Loss::Forward, T>(a, stream);
  launch_1d<&value_kernel<Loss, T>>(blocks, kThreads, 0, stream, a);
  if (a.total) launch_1d<&total_kernel>(1, kThreads, 0, stream, a);
}
template <class T>
void run(const SurvivalArgs& a, cudaStream_t stream) {
  if (a.kind == Survival::cox) return run_loss<Cox<Score<T>>, T>(a, stream);
  run_loss<Dart<Score<T>>, T>(a, stream);
}

}  // namespace

void survival(const SurvivalArgs& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  with_device_type(args.dtype, [&]<class T> { run<T>(args, s); });
}

}  // namespace fastloss::cuda
