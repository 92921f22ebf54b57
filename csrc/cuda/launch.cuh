// Host code of every kernel: the launch of a one-dimensional grid, and the dispatch by dtype.
#pragma once
#include "../math/dtype.h"
#include "attributes.h"
#include "vector.cuh"

namespace fastloss::cuda {

// Nothing is launched for 0 blocks. Registers the kernel, see attributes.h.
template <auto kKernel, class... A>
void launch_1d(int64_t blocks, int threads, size_t shared, cudaStream_t stream, const A&... arguments) {
  (void)Registered<kKernel>::done;
  if (blocks > 0)
    launch(kKernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared, stream,
           arguments...);
}

// The blocks of a launch that may find that there is nothing to do (skip_unit_upstream): no more than a large
// GPU holds at once, so that finding out costs little. Where there is something, each block takes several turns.
inline int64_t blocks_to_skip(int64_t blocks, int threads) {
  const int64_t most = int64_t{132} * 2048 / threads;
  return blocks < most ? blocks : most;
}

// The same with clusters of `size` blocks: as many as run at once, but no more than `wish`. False, and nothing
// is launched, where the device has none.
template <auto kKernel, class... A>
bool launch_clusters_1d(int64_t wish, int size, int threads, size_t shared, cudaStream_t stream,
                        const A&... arguments) {
  (void)Registered<kKernel>::done;
  const dim3 block(static_cast<unsigned>(threads));
  const int64_t most = max_clusters(kKernel, block, shared, size), clusters = wish < most ? wish : most;
  if (most <= 0) return false;
  if (clusters > 0)
    launch_clusters(kKernel, dim3(static_cast<unsigned>(clusters * size)), block, shared, stream, size,
                    arguments...);
  return true;
}

template <class Body>
void with_device_type(DType dtype, Body body) {
  with_type<__nv_bfloat16, __half>(dtype, body);
}

}  // namespace fastloss::cuda
