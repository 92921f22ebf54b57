// A term of the cross-entropy for rows whose label is a number: a loss of the predicted numbers.
//
// q is the softmax over the number tokens alone. With a table of the distances of token k from the label's
// token i, and S = sum_k q_k table_ik, the term is
//   S                        the Wasserstein distance, of a table |v_k - v_i|
//   S^2                      the squared error, of a table v_k - v_i
//   loss m + max (1 - m)     either of them, reweighed by the probability m of all number tokens; max is
//                            the largest distance
// Beyond the row's statistics it needs the logits of the number tokens, read while the row is in cache.
//
// S is the distance of the most probable number token, the pivot, plus what the others differ from it. For a
// confident row that sum is small, and so is its rounding error: the gradient takes the difference of a
// token's distance and S.
#pragma once
#include "../math/math.h"

namespace fastloss::inline FL_ISA {

template <class R>
struct NumberTerm {
  // d value / d z_j is p_j dense_coef, and for number k also q_k (table_ik - mean) of_q + p_k of_p
  R value, dense_coef;  // value is added to the row's loss
  R of_q, of_p;
  R pivot, rest, top, total;  // S = pivot + rest; q_k = exp(z_k - top) / total
};

template <class R>
struct NumberTokens {
  bool squared, reweigh;

  FL_FN NumberTokens(bool squared_, bool reweigh_) : squared(squared_), reweigh(reweigh_) {}

  FL_FN NumberTerm<R> term(R weight, R max_distance, R pivot, R rest, R top, R total, R row_max,
                           R row_log_sum) const {
    const R mean = pivot + rest;
    const R loss = squared ? mean * mean : mean, slope = squared ? 2 * mean : R(1);
    NumberTerm<R> t{weight * loss, 0, weight * slope, 0, pivot, rest, top, total};
    if (reweigh) {
      const R mass = exp((top - row_max) + (log(total) - row_log_sum));
      t.value = weight * (loss * mass + max_distance * (1 - mass));
      t.of_q *= mass;
      t.of_p = weight * (loss - max_distance);
      t.dense_coef = -t.of_p * mass;
    }
    return t;
  }
  // The part of the gradient of number tokens only: from e = exp(z - top), p = softmax(z) and table_ik.
  template <class F>
  static FL_FN F self_term(const NumberTerm<R>& t, F e, F p, F distance) {
    return (e / t.total) * ((distance - t.pivot) - t.rest) * t.of_q + p * t.of_p;
  }
};

}  // namespace fastloss::inline FL_ISA
