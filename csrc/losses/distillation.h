// Divergences between the distributions of two rows of logits: a teacher's p and a student's q.
//
//   kForward  KL(p || q)      kReverse  KL(q || p)
//   kMixture  beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
//
// With u = log(p / m) and v = log(q / m) (kForward: u = log(p / q), kReverse: v = log(q / p)), A = sum p u
// and B = sum q v, the loss is a sum of weighted A and B, and its derivatives by the logits are weighted p (u
// - A) and q (v - B). A mixture is no sum of terms in exp(z - maximum), so that the normalisers come first:
// two sweeps over a row in cache, and a third for the gradients.
//
// A is that u of the teacher's most probable class plus the rest, sum p (u - u of that class), which is small
// where that class has nearly all the probability: then the derivatives, differences of u and A, are small
// too, and keep their precision. So is B with the student's. In other rows 0 may stand for u of that class.
#pragma once
#include "../drivers/rows.h"
#include "../math/math.h"

namespace fastloss {

struct DivergenceArgs {
  RowArgs rows;  // x, dx: the student's logits; q: the teacher's; state: kDivergenceState numbers a row
  void* dq;      // [rows, n], contiguous, or null; so is rows.dx
};
// maximum, sum of student and teacher; u and v of their most probable classes, the rest of A and B; row weight
inline constexpr int64_t kDivergenceState = 9;

}  // namespace fastloss

namespace fastloss::inline FL_ISA {

// Differences of two distributions see the error of a GPU's approximate exponential. x <= 0
template <class F>
FL_FN F full_exp(F x) {
  return exp(x);
}
FL_FN float full_exp(float x) { return exp_down(x); }

enum DivergenceKind { kForward, kReverse, kMixture };

template <class R, int kKind>
struct LogitDivergence {
  FL_HPARAMS(beta, odds, log_p, log_q);
  R beta, odds, log_p, log_q;  // (1 - beta) / beta, log beta, log(1 - beta)

  FL_FN explicit LogitDivergence(const double* hparams)
      : beta(R(hparams[H::beta])),
        odds(R(hparams[H::odds])),
        log_p(R(hparams[H::log_p])),
        log_q(R(hparams[H::log_q])) {}

  template <class F>
  struct LogRatios {
    F u, v;  // log(p / m), log(q / m), see above
  };
  // From the logits less the maximum of their row, exact near it, and the difference of the logarithms of the
  // sums, whose rounding moves all classes alike, which no gradient sees: d = log(p / q). With size = |d|, w
  // the weight of the smaller of p and q, m over the larger is 1 + w (e^-size - 1) = (1 - w) (1 + w / (1 - w)
  // e^-size): the first is right for small sizes, the second for large ones.
  template <class F>
  FL_FN LogRatios<F> log_ratios(F student, F teacher, R log_sums) const {
    const F d = (teacher - student) - log_sums;
    if constexpr (kKind == kForward) return {d, F{}};
    if constexpr (kKind == kReverse) return {F{}, -d};
    const F size = abs(d);
    const auto more = d > 0, is_large = size > R(0.7);
    const F of_small = select(more, fill<F>(1 - beta), fill<F>(beta)) * expm1(-size);
    const F of_large = select(more, fill<F>(odds), fill<F>(1 / odds)) * full_exp(-size);
    const F log_weight = select(is_large, select(more, fill<F>(log_p), fill<F>(log_q)), F{});
    const F larger = -(log_weight + log1p(select(is_large, of_large, of_small))), smaller = larger - size;
    return {select(more, larger, smaller), select(more, smaller, larger)};
  }
  // Nothing has probability 0 and an infinite or undefined logarithm that counts.
  template <class F>
  static FL_FN F weighed(F p, F u) {
    return select(p == 0, F{}, p * u);
  }
  // A log-ratio that others are relative to.
  static FL_FN R finite(R u) { return abs(u) < R(INFINITY) ? u : 0; }
  FL_FN R loss(R a, R b) const {
    if constexpr (kKind == kForward) return a;
    if constexpr (kKind == kReverse) return b;
    return beta * a + (1 - beta) * b;
  }
  template <class F>
  FL_FN F by_student(F p, F q, F v, R top_v, R rest, R g) const {
    if constexpr (kKind == kForward) return (q - p) * g;
    return weighed(q, (v - top_v) - rest) * (kKind == kMixture ? (1 - beta) * g : g);
  }
  template <class F>
  FL_FN F by_teacher(F p, F q, F u, R top_u, R rest, R g) const {
    if constexpr (kKind == kReverse) return (p - q) * g;
    return weighed(p, (u - top_u) - rest) * (kKind == kMixture ? beta * g : g);
  }
};

inline int divergence_kind(double beta) { return beta == 0 ? kForward : beta == 1 ? kReverse : kMixture; }

}  // namespace fastloss::inline FL_ISA
