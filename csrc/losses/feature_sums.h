// The sums of a row a and another row b, a feature x, y of them at a time, and their gradients. What is
// d = x - y + eps of no feature is the caller's to say.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "../math/math.h"

namespace fastloss {

inline constexpr int kFeatureSums = 4, kMaxOthers = 2;

// What a kernel that walks two or three tensors of rows of features together is told. Plain data: no torch.
//
// Of row a and of each other row b the four sums <a, b>, <a, a>, <b, b> and |a - b + eps|^2, from one read;
// backwards, from their gradients, those of all rows, written once.
struct FeatureArgs {
  DType dtype;      // of rows and their gradients
  int64_t rows, n;  // [rows, n]
  int others;       // how many tensors a is compared with
  const void* a;
  const void* other[kMaxOthers];
  double eps;
  void* sums;        // [others, kFeatureSums, rows] in the accumulation type, or null: backwards
  const void* grad;  // the same, of the sums
  void* da;          // [rows, n]
  void* d_other[kMaxOthers];
  bool past_cache;  // gradients are larger than the caches
};

}  // namespace fastloss

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
