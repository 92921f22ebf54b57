// Element types and 16-byte accesses on CUDA.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "../math/math.h"
#include "cuda_or_shim.cuh"

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
// The same, for lines that are not read again soon: evicted from L2 first.
template <class T>
__device__ __forceinline__ void store16_first_out(T* p, const Vec<T>& x) {
  uint4 raw;
  std::memcpy(&raw, &x, 16);
  __stcs(reinterpret_cast<uint4*>(p), raw);
}
// All elements of v in the accumulation type, one instruction each: bf16 by shift and mask.
template <class T>
__device__ __forceinline__ void widen_all(const Vec<T>& v, acc_t<T>* out) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    unsigned w[4];
    std::memcpy(w, &v, 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(w[i] << 16);
      out[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) out[k] = widen(v.v[k]);
  }
}
// 16 bytes that start `off` bytes after a 16-byte boundary, assembled from two aligned loads: both have to be
// readable. Neighbouring lanes load the same lines.
template <class T>
__device__ __forceinline__ Vec<T> load16_shifted(const T* p, unsigned off) {
  const uint4* low = reinterpret_cast<const uint4*>(p - off / sizeof(T));
  const uint4 a = low[0], b = low[1];
  const unsigned w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  unsigned by2[6], by1[5], out[4];  // registers can be indexed by constants only
#pragma unroll
  for (int i = 0; i < 6; ++i) by2[i] = off & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) by1[i] = off & 4 ? by2[i + 1] : by2[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned long long pair = static_cast<unsigned long long>(by1[i + 1]) << 32 | by1[i];
    out[i] = static_cast<unsigned>(pair >> off % 4 * 8);
  }
  Vec<T> r;
  std::memcpy(&r, out, 16);
  return r;
}
// The inverse, two half-precision elements at a time.
template <class T>
__device__ __forceinline__ Vec<T> narrow_all(const acc_t<T>* x) {
  Vec<T> v;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; k += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[k], x[k + 1]);
      std::memcpy(&v.v[k], &pair, sizeof pair);
    }
  } else if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; k += 2) {
      const __half2 pair = __floats2half2_rn(x[k], x[k + 1]);
      std::memcpy(&v.v[k], &pair, sizeof pair);
    }
  } else {
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) v.v[k] = narrow<T>(x[k]);
  }
  return v;
}
// 16 bytes from any element boundary of a row that spans [begin, end); element by element at its ends.
template <class T>
__device__ __forceinline__ Vec<T> load16_any(const T* p, const T* begin, const T* end) {
  const unsigned off = static_cast<unsigned>(reinterpret_cast<uintptr_t>(p) % 16);
  if (off == 0) return load16(p);
  const T* low = p - off / sizeof(T);
  if (low >= begin && low + 2 * Vec<T>::kSize <= end) return load16_shifted(p, off);
  Vec<T> r;
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) r.v[k] = p[k];
  return r;
}

// Elements from p to the next 16-byte boundary, `n` at most.
template <class T>
__device__ __forceinline__ int64_t elements_to_boundary(const T* p, int64_t n) {
  const int64_t head = (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T);
  return head < n ? head : n;
}

}  // namespace fastloss::cuda
