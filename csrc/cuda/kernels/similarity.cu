// Passes over a block of a matrix of similarities. For statistics and gradients the block is cut into bands
// of rows and spans of columns, and a second kernel merges their partial sums; the rarer passes take a
// thread block for each row. The order of sums depends on the shape of the block alone.
#include "../launch.cuh"
#include "../launchers.h"
#include "similarity_gradient.cuh"
#include "similarity_rows.cuh"
#include "similarity_statistics.cuh"

namespace fastloss::cuda::similarity {

// Launches the kernel's instantiation with or without ids.
#define FASTLOSS_BY_IDS(kernel, grid, ...)                             \
  (a.row_ids ? launch_cut<&kernel<__VA_ARGS__, true>>(a, grid, stream) \
             : launch_cut<&kernel<__VA_ARGS__, false>>(a, grid, stream))

template <auto kKernel>
void launch_cut(const TileChunk& a, const Grid& g, cudaStream_t stream) {
  (void)Registered<kKernel>::done;
  launch(kKernel, dim3(static_cast<unsigned>(g.bands), static_cast<unsigned>(g.spans)),
         dim3(static_cast<unsigned>(g.warps * 32)), 0, stream, a, g.band);
}

template <class R, class G>
void run_gradient(const TileChunk& a, cudaStream_t stream) {
  const Grid g = element_grid<R>(a);
  if (a.pass == TilePass::sigmoid)
    FASTLOSS_BY_IDS(sigmoid_kernel, g, R, G);
  else
    FASTLOSS_BY_IDS(gradient_kernel, g, R, G);
}

template <class R>
void run(const TileChunk& a, cudaStream_t stream) {
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  switch (a.pass) {
    case TilePass::statistics: {
      const Grid g = statistics_grid<R>(a);
      FASTLOSS_BY_IDS(statistics_kernel, g, R);
      return launch_1d<&merge_kernel<R>>(blocks(a.rows, 32) + (a.col_max ? blocks(a.cols, 32) : 0),
                                         kMergeThreads, 0, stream, a, g.spans, g.bands);
    }
    case TilePass::pairs:
      return launch_1d<&pairs_kernel<R>>(a.rows, kRowThreads, 0, stream, a);
    case TilePass::hardest:
      return launch_1d<&hardest_kernel<R>>(a.rows, kRowThreads, 0, stream, a);
    case TilePass::sigmoid:
    case TilePass::softmax_gradient:
    case TilePass::pairs_gradient:
      if constexpr (std::is_same_v<R, double>)
        run_gradient<double, double>(a, stream);
      else if (a.g_type == DType::bf16)
        run_gradient<float, __nv_bfloat16>(a, stream);
      else if (a.g_type == DType::f16)
        run_gradient<float, __half>(a, stream);
      else
        run_gradient<float, float>(a, stream);
      if (a.pass == TilePass::sigmoid || a.dots)
        launch_1d<&spans_kernel<R>>(blocks(a.rows, kRowThreads), kRowThreads, 0, stream, a,
                                    element_grid<R>(a).spans, a.pass == TilePass::sigmoid);
      return;
  }
}

template <class R>
int64_t partials(const TileChunk& a) {
  if (a.pass == TilePass::sigmoid) return 3 * element_grid<R>(a).spans * a.rows;
  if (a.pass != TilePass::statistics) return a.dots ? element_grid<R>(a).spans * a.rows : 0;
  const Grid g = statistics_grid<R>(a);
  return 3 * g.spans * a.rows + (a.col_max ? 2 * g.bands * a.cols : 0);
}

}  // namespace fastloss::cuda::similarity

namespace fastloss::cuda {

int64_t tile_partials(const TileChunk& a) {
  return a.is_double ? similarity::partials<double>(a) : similarity::partials<float>(a);
}

void tile_chunk(const TileChunk& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  a.is_double ? similarity::run<double>(a, s) : similarity::run<float>(a, s);
}

}  // namespace fastloss::cuda
