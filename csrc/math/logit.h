// The sigmoid of |x| from e = e^-|x|, in [0, 1], which losses of logits share: within two units in the last
// place. On the GPU without the branch that an IEEE division would need.
#pragma once
#include "math.h"

namespace fastloss::inline FL_ISA {

// 1 / (1 + e) = sigmoid(|x|)
template <class F>
FL_FN F sigmoid_of_exp(F e) {
  return 1 / (1 + e);
}

#if defined(__CUDACC__) || defined(FL_DEVICE_MATH)
FL_FN float sigmoid_of_exp(float e) {
#if defined(__CUDA_ARCH__) || defined(FL_DEVICE_MATH)
  const float d = 1 + e, r = cuda::reciprocal_approx(d);  // and one Newton step
  return ::fmaf(r, ::fmaf(-d, r, 1.f), r);
#else
  return 1 / (1 + e);
#endif
}
#endif

}  // namespace fastloss::inline FL_ISA
