// What the losses of similarities are made of: which entries of the matrix count as what, probabilities
// relative to saved statistics, and softplus. `F` is a number or a vector, R a number.
#pragma once
#include "../math/math.h"

namespace fastloss::inline FL_ISA {

enum class Entry { left_out, positive, negative };

// What entry (i, j) counts as. It is marked if j == mark[i], and equal if row_ids[i] == col_ids[j]:
//
//   same_is_positive   marked               equal, not marked           neither
//   false              the positive         left out: false negative    negative
//   true               left out: itself     positive: of its class      negative
//
// Sums of exponentials are over the negatives, with_positives over the positives too.
struct EntryRule {
  bool same_is_positive, with_positives;

  FL_FN Entry operator()(bool marked, bool equal) const {
    if (marked) return same_is_positive ? Entry::left_out : Entry::positive;
    if (!equal) return Entry::negative;
    return same_is_positive ? Entry::positive : Entry::left_out;
  }
  FL_FN bool summed(Entry e) const {
    return e == Entry::negative || (e == Entry::positive && with_positives);
  }
};

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
