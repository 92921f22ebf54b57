// Clusters of blocks, which run at the same time and write to each other's shared memory. For kernels that are
// launched where there are clusters (max_clusters): code for older devices, for which kHasClusters is false,
// does nothing.
#pragma once
#include "cuda_or_shim.cuh"

namespace fastloss::cuda {

#if defined(FL_SIMT)

constexpr bool kHasClusters = true;
using simt::cluster_rank;
using simt::cluster_size;
using simt::cluster_sync;
using simt::peer_shared;

#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#define FL_CLUSTER_PTX(...)
#else
constexpr bool kHasClusters = true;
#define FL_CLUSTER_PTX(...) asm(__VA_ARGS__)
#endif

// Of this block in its cluster, and the number of blocks.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
  FL_CLUSTER_PTX("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
  FL_CLUSTER_PTX("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Waits for all threads of the cluster, and makes their writes visible to each other. Whole warps call it.
__device__ __forceinline__ void cluster_sync() {
  FL_CLUSTER_PTX(
      "barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" :: : "memory");
}
// What `mine`, in shared memory, is in the block of this rank. That block has to have started, and must not
// have returned when the memory is used: there is a barrier of the cluster before the call and after it.
template <class X>
__device__ __forceinline__ X* peer_shared(X* mine, unsigned rank) {
  X* theirs = mine;
  FL_CLUSTER_PTX("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return theirs;
}
#undef FL_CLUSTER_PTX

#endif

}  // namespace fastloss::cuda
