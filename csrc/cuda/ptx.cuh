// Inline PTX, and beside each instruction what it does in C++ for tests/cuda_on_cpu. Included where the
// compiler builds for a GPU or plays one; knows nothing of the rest.
#pragma once

namespace fastloss::cuda {

// 2^x to 2 ulp, flushing what is below 2^-126: without ftz three more instructions would save it.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(FL_SIMT)
  return __exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace fastloss::cuda
