// Which triplets count: those with positive_key(d_ip) > negative_key(d_in). A distance that is NaN counts in
// all of its triplets, so that it is not lost.
#pragma once
#include "../math/scalar_math.h"

namespace fastloss::inline FL_ISA {

template <class R>
FL_FN R positive_key(R d, R margin) {
  return d == d ? d + margin : R(INFINITY);
}
template <class R>
FL_FN R negative_key(R d) {
  return d == d ? d : R(-INFINITY);
}

// How many of n sorted keys are less than `key`, or at most `key`.
template <class R>
FL_FN int64_t count_below(const R* keys, int64_t n, R key, bool at_most) {
  int64_t begin = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    const R middle = keys[begin + half];
    const bool below = at_most ? middle <= key : middle < key;
    begin = below ? begin + half + 1 : begin;
    n = below ? n - half - 1 : half;
  }
  return begin;
}

// The factor of x_i - x_j in the gradient, from that of its distance; 0 where two rows are equal.
template <class R>
FL_FN R triplet_weight(R d, R up, bool root) {
  if (!root) return 2 * up;
  return d == 0 ? R(0) : up / d;
}

}  // namespace fastloss::inline FL_ISA
