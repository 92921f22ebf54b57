// What the losses of similarities are made of: probabilities relative to saved statistics, and softplus.
// `F` is a number or a vector, R a number.
#pragma once
#include "../math/math.h"

namespace fastloss::inline FL_ISA {

// exp(s) / sum exp: the share of an entry in its row or column, 0 where nothing was summed.
template <class F, class R>
FL_FN F softmax_share(F s, R m, R log_sum) {
  return log_sum == R(-INFINITY) ? F{} : exp_down((s - m) - log_sum);
}

// log(1 + e^u), and its derivative sigma(u) in `slope`; both keep their relative precision.
template <class F>
FL_FN F softplus(F u, F& slope) {
  const F e = exp_down(-abs(u)), share = 1 / (1 + e);
  slope = select(u > 0, share, e * share);
  return max(u, F{}) + log1p_unit(e);
}

// The merged sum of two groups that were summed relative to m and to `other`, relative to `base`, which is at
// least the maximum of each that is not empty.
template <class F>
FL_FN F merged_sum(F sum, F m, F other_sum, F other, F base) {
  const F most = F{} + 50;  // an empty group may have been summed relative to anything
  return sum * exp(min(m - base, most)) + other_sum * exp(min(other - base, most));
}

}  // namespace fastloss::inline FL_ISA
