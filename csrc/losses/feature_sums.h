// The sums of a row a and another row b (losses/feature_sums_args.h), a feature x, y of them at a time, and
// their gradients. What is d = x - y + eps of no feature is the caller's to say.
#pragma once
#include "../math/scalar_math.h"
#include "feature_sums_args.h"

namespace fastloss::inline FL_ISA {

template <class F>
FL_FN void add_feature(F (&sums)[kFeatureSums], F x, F y, F d) {
  sums[0] += x * y;
  sums[1] += x * x;
  sums[2] += y * y;
  sums[3] += d * d;
}

template <class R>
struct FeatureGradient {
  R dot, aa, bb, dd;  // derivatives by the sums, those by squares times 2

  FeatureGradient() = default;
  // `grad` is that of the first sum, the others lie `stride` apart.
  FL_FN FeatureGradient(const R* grad, int64_t stride)
      : dot(grad[0]), aa(2 * grad[stride]), bb(2 * grad[2 * stride]), dd(2 * grad[3 * stride]) {}

  // The derivative by y; that by x is added to dx, but for its x * aa, which rows b share.
  template <class F>
  FL_FN F by_other(F x, F y, F d, F& dx) const {
    const F apart = d * dd;
    dx += y * dot + apart;
    return x * dot + y * bb - apart;
  }
};

}  // namespace fastloss::inline FL_ISA
