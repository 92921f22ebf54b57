// Reductions over the lanes of a warp and the threads of a block, each in an order of its own that depends on
// nothing but their number, and with the result for all of them unless it is said otherwise.
//
// A function that shares memory may stand once in a kernel, or with a barrier between: what is shared may
// still be read by some threads when others have returned. Every thread of the block calls it, and sees what
// the others wrote before.
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

// What is joined: a thread's own number, then another's.
struct Sum {
  template <class R>
  __device__ __forceinline__ R operator()(R mine, R other) const {
    return mine + other;
  }
};
struct Max {  // an own NaN stays, another's is dropped
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

// x of the lane whose number differs by the bits of `offset`: a number, or a struct of 4-byte words.
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

// kLanes neighbouring lanes, a power of two, which `mask` names and perhaps others like them.
template <int kLanes = 32, class X, class Join>
__device__ __forceinline__ X warp_reduce(X x, Join join, unsigned mask = kFullMask) {
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) x = join(x, from_lane(mask, x, offset));
  return x;
}
// The same of several numbers, in their place: their shuffles are on their way together.
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

// The warps' parts joined one after the other.
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
// The same of numbers, from 0 on.
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
// The threads' structs joined in a tree in shared memory; thread 0 gets the whole.
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
