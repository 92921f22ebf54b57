// Reductions over the lanes of a warp and the threads of a block. Their order depends on the number of
// threads alone; all threads get the result unless stated otherwise.
//
// Hazard: between two calls of a function that uses shared memory there has to be a barrier, since some
// threads may still read it when others have returned. Every thread of the block has to call it; it contains
// a barrier, after which earlier writes of the other threads are visible.
#pragma once
#include <cstring>

#include "vector.cuh"

namespace fastloss::cuda {

constexpr unsigned kFullMask = 0xffffffffu;

// The lanes of this thread's warp that are in its team of kTeam threads, a power of two.
template <int kTeam>
__device__ __forceinline__ unsigned team_mask() {
  if constexpr (kTeam >= 32) return kFullMask;
  return ((1u << kTeam % 32) - 1) << (threadIdx.x % 32 & ~(kTeam - 1u));
}

// Operators on (this thread's value, another's).
struct Sum {
  template <class R>
  __device__ __forceinline__ R operator()(R mine, R other) const {
    return mine + other;
  }
};
struct Max {  // keeps a NaN of this thread, drops one of another
  template <class R>
  __device__ __forceinline__ R operator()(R mine, R other) const {
    return max(other, mine);
  }
};
struct Merge {  // of structs
  template <class S>
  __device__ __forceinline__ S operator()(S mine, const S& other) const {
    mine.merge(other);
    return mine;
  }
};

// x of lane `lane ^ offset`: a number, or a struct of 4-byte words.
template <class X>
__device__ __forceinline__ X from_lane(unsigned mask, const X& x, int offset) {
  if constexpr (std::is_arithmetic_v<X>) {
    return __shfl_xor_sync(mask, x, offset);
  } else {
    static_assert(sizeof(X) % 4 == 0 && std::is_trivially_copyable_v<X>);
    unsigned words[sizeof(X) / 4];
    std::memcpy(words, &x, sizeof x);
#pragma unroll
    for (unsigned& word : words) word = __shfl_xor_sync(mask, word, offset);
    X other;
    std::memcpy(&other, words, sizeof x);
    return other;
  }
}

// Over groups of kLanes neighbouring lanes, a power of two. `mask`: the lanes that take part, one or more
// groups.
template <int kLanes = 32, class X, class Join>
__device__ __forceinline__ X warp_reduce(X x, Join join, unsigned mask = kFullMask) {
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) x = join(x, from_lane(mask, x, offset));
  return x;
}
// The same for several numbers, in place; their shuffles overlap.
template <int kLanes = 32, class X, int N, class Join>
__device__ __forceinline__ void warp_reduce_all(X (&x)[N], Join join, unsigned mask = kFullMask) {
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2)
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = join(x[k], from_lane(mask, x[k], offset));
}
template <class R>
__device__ __forceinline__ R warp_sum(R x) {
  return warp_reduce(x, Sum{});
}

// Over a block: warps reduce, then their results are joined in order.
template <int kThreads, class X, class Join>
__device__ __forceinline__ X block_reduce(X x, Join join) {
  x = warp_reduce(x, join);
  if constexpr (kThreads > 32) {
    FL_SHARED(X, part, kThreads / 32);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = part[0];
    for (int w = 1; w < kThreads / 32; ++w) x = join(x, part[w]);
  }
  return x;
}
// The same as a sum of numbers.
template <int kThreads, class R>
__device__ __forceinline__ R block_sum(R x) {
  FL_SHARED(R, part, kThreads / 32);
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < kThreads / 32; ++w) x += part[w];
  return x;
}
// Joins the threads' structs in a tree in shared memory; thread 0 gets the result.
template <int kThreads, class S>
__device__ __forceinline__ S block_merge_tree(const S& mine) {
  FL_SHARED(S, part, kThreads);
  part[threadIdx.x] = mine;
  for (int width = kThreads / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(width)) {
      S whole = part[threadIdx.x];
      whole.merge(part[threadIdx.x + width]);
      part[threadIdx.x] = whole;
    }
  }
  return part[threadIdx.x];
}

}  // namespace fastloss::cuda
