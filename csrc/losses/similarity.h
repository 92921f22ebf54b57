// What the losses of similarities share: the rule for what an entry counts as, probabilities from saved
// statistics, and softplus. F is a scalar or a vector, R a scalar.
#pragma once
#include "../math/math.h"

namespace fastloss::inline FL_ISA {

enum class Entry { left_out, positive, negative };

// What entry (i, j) counts as. It is the target if j == target_col[i], and equal if row_ids[i] == col_ids[j]:
//
//   labels_are_positives   target              equal, not the target        neither
//   false                  positive            left out: false negative     negative
//   true                   left out: itself    positive: the same class     negative
//
// Sums of exponentials are over the negatives, with positives_in_denominator also over the positives.
struct EntryRule {
  bool labels_are_positives, positives_in_denominator;

  FL_FN Entry operator()(bool is_target, bool equal) const {
    if (is_target) return labels_are_positives ? Entry::left_out : Entry::positive;
    if (!equal) return Entry::negative;
    return labels_are_positives ? Entry::positive : Entry::left_out;
  }
  FL_FN bool summed(Entry e) const {
    return e == Entry::negative || (e == Entry::positive && positives_in_denominator);
  }
};

// exp(s) / sum exp: the probability of an entry in its row or column, 0 where nothing was summed.
template <class F, class R>
FL_FN F softmax_prob(F s, R m, R log_sum) {
  return log_sum == R(-INFINITY) ? F{} : exp_down((s - m) - log_sum);
}

// log(1 + e^u), and its derivative sigma(u) in `slope`; both keep their relative precision.
template <class F>
FL_FN F softplus(F u, F& slope) {
  const F e = exp_down(-abs(u)), sigmoid = 1 / (1 + e);
  slope = select(u > 0, sigmoid, e * sigmoid);
  return max(u, F{}) + log1p_unit(e);
}

}  // namespace fastloss::inline FL_ISA
