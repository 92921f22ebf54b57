// What every kernel's host side does: a launch of a grid in one dimension, and the choice of the type. And
// the sum over a block.
#pragma once
#include "../math/dtype.h"
#include "attributes.h"
#include "vector.cuh"

namespace fastloss::cuda {

// No blocks: nothing to do. The kernel is listed among the registered ones.
template <auto kKernel, class... A>
void start(int64_t blocks, int threads, size_t shared, cudaStream_t stream, const A&... arguments) {
  (void)Registered<kKernel>::done;
  if (blocks > 0)
    launch(kKernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared, stream,
           arguments...);
}

template <class Body>
void with_device_type(DType dtype, Body body) {
  with_type<__nv_bfloat16, __half>(dtype, body);
}

// The sum of x over the warp's lanes, in a fixed order, for all of them.
template <class R>
__device__ __forceinline__ R sum_of_warp(R x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
// The sum of x over the block's threads, in a fixed order, for all of them. Once in a kernel: what is shared
// may still be read when it returns. Whatever the threads wrote before, all see.
template <int kThreadsOfBlock, class R>
__device__ __forceinline__ R sum_of_block(R x) {
  FL_SHARED(R, part, kThreadsOfBlock / 32);
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < kThreadsOfBlock / 32; ++w) x += part[w];
  return x;
}

}  // namespace fastloss::cuda
