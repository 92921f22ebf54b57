// Online softmax: the running maximum, and the sum of exp(z - maximum), rescaled when the maximum rises. The
// two stay apart to the end: adding log(sum) to a large maximum would lose small losses. -infinity adds 0.
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

  // Adds z. `exp_of` computes its exponential; the factor that rescales the sum need not be as exact.
  template <class Exp>
  FL_FN void push(R z, Exp exp_of) {
    if (z > top) {
      if (top != -INFINITY) sum *= exp(top - z);
      top = z;
    }
    sum += exp_of(z - base());
  }
  // Adds two elements, without a branch.
  FL_FN void push_two(R a, R b) {
    const R joint = max(top, max(a, b)), to = softmax_base(joint);
    sum = sum * exp(top - to) + (exp(a - to) + exp(b - to));
    top = joint;
  }
  // Adds the elements of another accumulator. The products are rounded alone, so that both sides of an
  // exchange get the same bits.
  FL_FN void merge(const OnlineSoftmax& o) {
    const R joint = max(o.top, top), to = softmax_base(joint);
    sum = product(sum, top == -INFINITY ? R(1) : exp(top - to)) +
          product(o.sum, o.top == -INFINITY ? R(1) : exp(o.top - to));
    top = joint;
  }
  // The same where this maximum is already that of both.
  FL_FN void add(R other_top, R other_sum) { sum += other_sum * exp(other_top - base()); }
};

// The joint sum, relative to `base`, of two groups that were summed relative to m and to `other`. `base` is
// at least the maximum of each group that is not empty. For vectors.
template <class F>
FL_FN F merged_sum(F sum, F m, F other_sum, F other, F base) {
  const F bound = F{} + 50;  // an empty group may be relative to anything
  return sum * exp(min(m - base, bound)) + other_sum * exp(min(other - base, bound));
}

}  // namespace fastloss::inline FL_ISA
