// Sums of exponentials in one sweep: the maximum so far, and the sum of exp(z - maximum), brought up to date
// when the maximum moves. The two stay apart to the end: log(sum) added to a large maximum would lose small
// losses. -infinity counts nothing.
#pragma once
#include "math.h"

namespace fastloss::inline FL_ISA {

// What exponentials are relative to where `top` is the maximum: 0 if nothing was counted.
FL_FN float softmax_base(float top) { return top == -INFINITY ? 0 : top; }
FL_FN double softmax_base(double top) { return top == -INFINITY ? 0 : top; }
template <class F>
FL_FN F softmax_base(F top) {
  return select(top == -scalar_t<F>(INFINITY), F{}, top);
}

template <class R>
struct OnlineSoftmax {
  R top = -INFINITY;
  R sum = 0;  // of exp(z - base())

  FL_FN R base() const { return softmax_base(top); }
  FL_FN R log_sum() const { return log(sum); }

  // Counts z. `exp_of` is its exponential; what brings the sum up to date need not be as exact.
  template <class Exp>
  FL_FN void push(R z, Exp exp_of) {
    if (z > top) {
      if (top != -INFINITY) sum *= exp(top - z);
      top = z;
    }
    sum += exp_of(z - base());
  }
  // Counts two numbers, without a branch.
  FL_FN void push_two(R a, R b) {
    const R joint = max(top, max(a, b)), to = softmax_base(joint);
    sum = sum * exp(top - to) + (exp(a - to) + exp(b - to));
    top = joint;
  }
  // Counts what another has counted.
  FL_FN void merge(const OnlineSoftmax& o) {
    const R joint = max(o.top, top), to = softmax_base(joint);
    sum = sum * (top == -INFINITY ? R(1) : exp(top - to)) +
          o.sum * (o.top == -INFINITY ? R(1) : exp(o.top - to));
    top = joint;
  }
  // The same in two steps: this one's maximum is that of all already.
  FL_FN void add(R other_top, R other_sum) { sum += other_sum * exp(other_top - base()); }
};

// The merged sum of two groups that were summed relative to m and to `other`, relative to `base`, which is at
// least the maximum of each that is not empty. Of vectors.
template <class F>
FL_FN F merged_sum(F sum, F m, F other_sum, F other, F base) {
  const F most = F{} + 50;  // an empty group may have been summed relative to anything
  return sum * exp(min(m - base, most)) + other_sum * exp(min(other - base, most));
}

}  // namespace fastloss::inline FL_ISA
