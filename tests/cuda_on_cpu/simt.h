// CUDA kernel source as ordinary C++: every CUDA thread is a fiber on a stack of its own, warps and blocks
// are stepped one after another by one host thread, and what a kernel asks of the machine is checked as it is
// asked. Needs the toolkit's headers (for its vector, half and stream types) but no GPU. Tests only.
//
// Environment: SIMT_ORDER is the schedule: 0 blocks, warps and lanes in order, 1 all reversed, else a seed.
// SIMT_CLUSTERS is how many clusters run at once: 0 for a device without.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __maxnreg__
#undef __forceinline__
#undef __noinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
// A bare __shared__ would silently become a local of each thread: make it a compile error.
#define __shared__ FL_SHARED_is_needed_here_instead_of___shared__

namespace simt {

// What a kernel did wrong, with the thread that did it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void fail(const std::string& what);

struct Index {
  unsigned x, y, z;
  operator uint3() const { return {x, y, z}; }
};
struct Thread {  // what a kernel can see of itself
  Index index;
  unsigned linear, lane, warp;
};
extern Thread* current;
extern Index block_index;
extern dim3 block_dim, grid_dim;

using Body = void (*)(void*);
// Runs `body(context)` once for every thread of the grid, `cluster` blocks at a time; the context is constant
// meanwhile. Launches from several host threads take turns.
void run(Body body, void* context, size_t context_bytes, dim3 grid, dim3 block, size_t dynamic_shared,
         unsigned cluster);

template <class... P, class... A>
void launch_clusters(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t, unsigned cluster,
                     A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
  using Params = std::tuple<std::decay_t<P>...>;
  struct Context {
    void (*kernel)(P...);
    Params params;
  } context{kernel, Params(std::forward<A>(args)...)};
  const Body body = [](void* c) {
    auto* call = static_cast<Context*>(c);
    Params own = call->params;  // every thread may change its parameters
    std::apply(call->kernel, own);
  };
  run(body, &context, sizeof context, grid, block, smem, cluster);
}
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, A&&... args) {
  launch_clusters(kernel, grid, block, smem, stream, 1, std::forward<A>(args)...);
}

constexpr unsigned kMaxCluster = 8;  // blocks
struct Block;
// One per FL_SHARED and template instantiation: an exactly sized array, filled with NaN for every block.
struct SharedArray {
  size_t bytes, align;
  void* memory[kMaxCluster] = {};  // of each block of a cluster
  uint64_t block_serial[kMaxCluster] = {};
  constexpr SharedArray(size_t bytes_, size_t align_) : bytes(bytes_), align(align_) {}  // no guard variable
  void* get();
  void* of(Block& block);
};
void* dynamic_shared(size_t align);

}  // namespace simt

#define threadIdx (simt::current->index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_dim)
#define gridDim (simt::grid_dim)
constexpr int warpSize = 32;

#define FL_SHARED(T, name, n)                                         \
  static simt::SharedArray name##_array(sizeof(T) * (n), alignof(T)); \
  T(&name)[n] = *static_cast<T(*)[n]>(name##_array.get())
#define FL_DYN_SHARED(T, name) T* name = static_cast<T*>(simt::dynamic_shared(alignof(T)))

#include "simt_cluster.h"
#include "simt_math.h"
#include "simt_memory.h"
#include "simt_warp.h"
