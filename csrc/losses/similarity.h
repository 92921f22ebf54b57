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

}  // namespace fastloss::inline FL_ISA
