// Inline PTX, and for each instruction its equivalent in C++ for tests/cuda_on_cpu. For device code only.
#pragma once
#include <cstring>

#include "cuda_or_shim.cuh"

namespace fastloss::cuda {

// 2^x to 2 ulp. Results below 2^-126 are flushed to 0: without ftz it takes three more instructions.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(FL_SIMT)
  return __exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x to 1 ulp.
__device__ __forceinline__ float reciprocal_approx(float x) {
#if defined(FL_SIMT)
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Hides from the compiler that these are the same values as before, so that it converts the 16 bytes again
// instead of keeping the converted values in up to four times as many registers.
template <class V>
__device__ __forceinline__ void forget([[maybe_unused]] V& v) {
#if !defined(FL_SIMT)
  static_assert(sizeof(V) == 16);
  unsigned w[4];
  std::memcpy(w, &v, 16);
  asm("" : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3]));
  std::memcpy(&v, w, 16);
#endif
}

}  // namespace fastloss::cuda
