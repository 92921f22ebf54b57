// Sums over the features of a row a and another row b, of which x and y are one feature, and their
// gradients. The caller computes d = x - y + eps and sets it to 0 in padding.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "../math/math.h"
#include "../math/scaled.h"

namespace fastloss {

inline constexpr int kFeatureSums = 4, kMaxOthers = 2;

// The arguments of a kernel that reads two or three tensors of rows of features together. Plain data: no
// torch.
//
// Forward: for row a and each other row b the four sums <a, b>, <a, a>, <b, b> and |a - b + eps|^2, from one
// read. Backward: from the sums' gradients those of all rows, written once.
struct FeatureArgs {
  DType dtype;      // of rows and their gradients
  int64_t rows, n;  // [rows, n]
  int others;       // how many tensors a is compared with
  const void* a;
  const void* other[kMaxOthers];
  double eps;
  void* sums;        // forward: [others, kFeatureSums, rows] in the accumulation type; backward: null
  const void* grad;  // backward: the same shape
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
  R dot, aa, bb, dd;  // gradients of the sums, those of squares times 2

  FeatureGradient() = default;
  // `grad` points to the first sum's gradient, the others follow at `stride`.
  FL_FN FeatureGradient(const R* grad, int64_t stride)
      : dot(grad[0]), aa(2 * grad[stride]), bb(2 * grad[2 * stride]), dd(2 * grad[3 * stride]) {}

  // Returns the gradient of y and adds that of x to dx, except x * aa, which is the same for all rows b. What
  // no sum's gradient arrives at counts nothing.
  template <class F>
  FL_FN F by_other(F x, F y, F d, F& dx) const {
    const F apart = scaled(dd, d);
    dx += scaled(dot, y) + apart;
    return scaled(dot, x) + scaled(bb, y) - apart;
  }
};

}  // namespace fastloss::inline FL_ISA
