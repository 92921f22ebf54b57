// Element types and 16-byte accesses on CUDA.
#pragma once
#include "port.cuh"
// port.cuh first: it decides what __device__ means
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "../core/portable.h"

namespace fastloss::cuda {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T narrow(acc_t<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

// 16 bytes of T; p is 16-byte aligned.
template <class T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};
template <class T>
__device__ __forceinline__ Vec<T> load16(const T* p) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  Vec<T> r;
  std::memcpy(&r, &raw, 16);
  return r;
}
template <class T>
__device__ __forceinline__ void store16(T* p, const Vec<T>& x) {
  uint4 raw;
  std::memcpy(&raw, &x, 16);
  *reinterpret_cast<uint4*>(p) = raw;
}
// Elements from p to the next 16-byte boundary, `n` at most.
template <class T>
__device__ __forceinline__ int64_t elements_to_boundary(const T* p, int64_t n) {
  const int64_t head = (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T);
  return head < n ? head : n;
}

}  // namespace fastloss::cuda
