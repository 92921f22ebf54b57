// The only place that depends on the compiler: nvcc, or a C++ compiler with the shim of tests/cuda_on_cpu
// (FL_SIMT). Kernels declare shared memory and are launched through these functions.
//
//   FL_SHARED(float, sums, 32);              a static block array; may stand in any device function
//   FL_DYN_SHARED(float, tile);              the launch's dynamic shared memory, 16-byte aligned
//   launch(&kernel<T>, grid, block, smem, stream, args...);
//   launch_clusters(&kernel<T>, grid, block, smem, stream, cluster, args...);  blocks in clusters of so many
//   max_clusters(&kernel<T>, block, smem, cluster)  of them that run at once; 0 where there are none
//   max_shared()                             bytes of shared memory that a block may have on this device
//   multiprocessors()                        of this device
#pragma once

#if defined(FL_SIMT)

#if !defined(FL_DEVICE_MATH)
#error "kernels are built with FL_DEVICE_MATH, or formulas would take other functions than on a GPU"
#endif
#include "simt.h"  // defines FL_SHARED and FL_DYN_SHARED too

namespace fastloss::cuda {
using simt::launch;
using simt::launch_clusters;
template <class... P>
int max_clusters(void (*)(P...), dim3, size_t, int) {
  return simt::max_clusters();
}
inline int64_t max_shared() { return 227 << 10; }
inline int multiprocessors() { return 2; }
}  // namespace fastloss::cuda

#else

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

// Raw storage: T may have a constructor, which CUDA would not run for a __shared__ variable.
#define FL_SHARED(T, name, n)                                          \
  __shared__ alignas(T) unsigned char name##_storage[sizeof(T) * (n)]; \
  T(&name)[n] = *reinterpret_cast<T(*)[n]>(name##_storage)
#define FL_DYN_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char fl_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fl_dynamic_shared)

namespace fastloss::cuda {

constexpr size_t kDefaultDynamicShared = 48 * 1024;  // more than this needs cudaFuncSetAttribute

[[noreturn]] inline void throw_launch_error(cudaError_t error, const char* step, const void* kernel,
                                            dim3 grid, dim3 block, size_t smem) {
  (void)cudaGetLastError();  // clears it: reported here, not by the next call of cudaGetLastError
  std::string name = "a kernel";
#if CUDART_VERSION >= 12030
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) == cudaSuccess && mangled) {
    char* readable = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
    name = readable ? readable : mangled;
    std::free(readable);
  }
#endif
  auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  throw std::runtime_error(std::string("fastloss: ") + step + " of " + name + " failed with " +
                           cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + "); grid " +
                           text(grid) + ", block " + text(block) + ", " + std::to_string(smem) +
                           " bytes of dynamic shared memory");
}

inline cudaError_t allow_shared(const void* kernel, size_t smem) {
  if (smem <= kDefaultDynamicShared) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
}
// The configuration of a launch in clusters. Points to its own attribute: not to be copied.
struct ClusterConfig {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  ClusterConfig(dim3 grid, dim3 block, size_t smem, cudaStream_t stream, int cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterConfig(const ClusterConfig&) = delete;
};

// Launches `kernel` on `stream`, its blocks in clusters of `cluster` if that is not 1; arguments are converted
// to the kernel's parameter types. Does not wait.
template <class... P, class... A>
void launch_clusters(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
                     int cluster, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
  const void* entry = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared(entry, smem);
  if (error != cudaSuccess) throw_launch_error(error, "shared memory attribute", entry, grid, block, smem);
  std::tuple<std::decay_t<P>...> params(std::forward<A>(args)...);
  error = std::apply(
      [&](auto&... p) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&p))..., nullptr};
        if (cluster == 1) return cudaLaunchKernel(entry, grid, block, pointers, smem, stream);
        const ClusterConfig c(grid, block, smem, stream, cluster);
        return cudaLaunchKernelExC(&c.config, entry, pointers);
      },
      params);
  if (error != cudaSuccess) throw_launch_error(error, "launch", entry, grid, block, smem);
}
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, A&&... args) {
  launch_clusters(kernel, grid, block, smem, stream, 1, std::forward<A>(args)...);
}

// An attribute of the device, or `otherwise` if the query fails: the launch that follows reports why.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess)
    return value;
  (void)cudaGetLastError();
  return otherwise;
}
inline int64_t max_shared() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kDefaultDynamicShared);
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, 1); }
template <class... P>
int max_clusters(void (*kernel)(P...), dim3 block, size_t smem, int cluster) {
  if (!device_attribute(cudaDevAttrClusterLaunch, 0)) return 0;
  const void* entry = reinterpret_cast<const void*>(kernel);
  const ClusterConfig c(dim3(static_cast<unsigned>(cluster)), block, smem, nullptr, cluster);
  int count = 0;
  if (allow_shared(entry, smem) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&count, entry, &c.config) == cudaSuccess)
    return count;
  (void)cudaGetLastError();
  return 0;
}

}  // namespace fastloss::cuda

#endif
