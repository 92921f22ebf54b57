// Token classification: losses of one row of logits z and one target (a class, or a probability for each
// class). The protocol is in drivers/row_loss.h.
#pragma once
#include <type_traits>

#include "../drivers/row_loss.h"
#include "../drivers/rows.h"
#include "number_token.h"
#include "token_statistics.h"

namespace fastloss::inline FL_ISA {

enum Targets { kHard, kSmooth, kSoft };

// w_y ((1 - s) nll + z_loss lse^2) + s / n sum_c w_c (lse - z_c); with soft targets q,
// sum_c w_c ((1 - s) q_c + s / n) (lse - z_c) + z_loss lse^2.
template <class R, int kTargets>
struct CrossEntropy : RowLossDefaults {
  static constexpr int kVariants = 3;
  static constexpr bool kSoftcap = kTargets == kSoft, kSideStreams = kTargets == kSoft;
  static constexpr bool kProportional = kTargets == kHard;
  static constexpr int kSaved = kTargets == kSoft ? 2 : 1;
  FL_HPARAMS(label_smoothing, z_loss);
  R smoothing, z_loss, per_class;  // per_class = smoothing / n

  static int variant(const RowArgs& a) {
    const bool smooth = a.hparams[H::label_smoothing] != 0;
    if (a.q || a.softcap > 0 || (a.class_weight && smooth)) return kSoft;
    return smooth ? kSmooth : kHard;
  }
  FL_FN bool weighed_by_class() const { return smoothing == 0; }
  FL_FN CrossEntropy(const double* hparams, int64_t n)
      : smoothing(R(hparams[H::label_smoothing])),
        z_loss(R(hparams[H::z_loss])),
        per_class(R(hparams[H::label_smoothing] / double(n))) {}

  template <class F>
  struct SmoothSums {
    F count{}, d{};
    FL_FN void add(F, F d_, F, F, const CrossEntropy&) {
      count += 1;
      d += d_;
    }
    FL_FN void move(F shift, F, F) { d += shift * count; }
  };
  template <class F>
  struct SoftSums {  // y: the dense part of the target distribution
    F y{}, yd{};
    FL_FN void add(F, F d, F w, F q, const CrossEntropy& l) {
      const F y_ = alone(w, alone(fill<F>(1 - l.smoothing), q) + l.per_class);
      y += y_;
      yd += select(y_ == 0, F{}, y_ * d);  // d is -infinity of a logit of -infinity
    }
    FL_FN void move(F shift, F, F) { yd += shift * y; }
  };
  template <class F>
  using Sums = std::conditional_t<kTargets == kHard, NoSums,
                                  std::conditional_t<kTargets == kSmooth, SmoothSums<F>, SoftSums<F>>>;

  FL_FN R project(RowState<R>& row, const Sums<R>& sums, R others, R e, const Target<R>& t) const {
    R loss = 0;
    if (t.hard) {
      const TargetProb<R> target = target_prob(others, e, t.d, row.log_sum);
      loss = (1 - smoothing) * t.weight * target.nll;
      row.saved[0] = target.one_minus_p;
    }
    if constexpr (kTargets == kSmooth) loss += per_class * (sums.count * row.log_sum - sums.d);
    if constexpr (kTargets == kSoft) {
      loss += sums.y * row.log_sum - sums.yd;
      row.saved[1] = sums.y;
    }
    const R lse = row.m + row.log_sum;
    return loss + t.weight * z_loss * lse * lse;
  }

  struct GradCoef {
    R p, y, hard;               // d/dz_j = p softmax_j - y w_j (...) - hard [j is the target]
    R dense_coef, one_minus_p;  // p without the hard target's share; 1 - softmax of the target
  };
  // An infinite g meets only terms that are there: a mixed-precision step is skipped for what torch skips it.
  FL_FN GradCoef grad_coef(const RowState<R>& row, const Target<R>& t, R g) const {
    GradCoef c{};
    if (t.hard) {
      c.hard = g * t.weight * (1 - smoothing);
      c.one_minus_p = row.saved[0];
    }
    if (z_loss != 0) c.dense_coef = g * t.weight * 2 * z_loss * (row.m + row.log_sum);
    if constexpr (kTargets == kSmooth) {
      c.dense_coef += product(g, smoothing);
      c.y = product(g, per_class);
    }
    if constexpr (kTargets == kSoft)
      if (!t.hard || smoothing != 0) {
        c.dense_coef += product(g, row.saved[1]);
        c.y = g;
      }
    c.p = c.hard + c.dense_coef;
    return c;
  }
  template <class F>
  FL_FN F grad(F p, F, F w, F q, const GradCoef& c) const {
    if constexpr (kTargets == kHard) return p * c.p;
    if constexpr (kTargets == kSmooth) return alone(p, fill<F>(c.p)) - c.y;
    const F y = alone(w, alone(fill<F>(1 - smoothing), q) + per_class);
    return alone(p, fill<F>(c.p)) - alone(fill<F>(c.y), y);
  }
  FL_FN R grad_at_target(R p, R, R w, const GradCoef& c) const {
    R dense = 0;
    if constexpr (kTargets == kSmooth) dense = c.y;
    if constexpr (kTargets == kSoft) dense = product(c.y, w * per_class);
    return (alone(c.dense_coef, p) - dense) - alone(c.hard, c.one_minus_p);  // of one class: exactly 0
  }
};

// Cross-entropy of a class, and a term for labels that are numbers.
template <class R, int>
struct CrossEntropyNumbers : CrossEntropy<R, kHard> {
  using Base = CrossEntropy<R, kHard>;
  static constexpr int kVariants = 1;
  static constexpr bool kNumberTokens = true;
  FL_HPARAMS(label_smoothing, z_loss, squared, reweigh);
  static_assert(H::label_smoothing == int(Base::H::label_smoothing) && H::z_loss == int(Base::H::z_loss));
  NumberTokens<R> number_tokens;

  static int variant(const RowArgs&) { return 0; }
  FL_FN CrossEntropyNumbers(const double* hparams, int64_t n)
      : Base(hparams, n), number_tokens(hparams[H::squared] != 0, hparams[H::reweigh] != 0) {}

  static FL_FN void add(typename Base::GradCoef& c, R g, R dense_coef) {
    if (dense_coef == 0) return;  // g may be infinite
    c.dense_coef += g * dense_coef;
    c.p += g * dense_coef;
  }
};

// What losses of the target's probability p = softmax(z)_y alone share: the derivative is A p_j for the other
// classes and -A (1 - p) for the target, with A and 1 - p saved for each row.
template <class R>
struct LossOfTargetProb : RowLossDefaults {
  static constexpr int kSaved = 2;
  static constexpr bool kProportional = true;
  template <class>
  using Sums = NoSums;
  static int variant(const RowArgs&) { return 0; }
  FL_FN bool weighed_by_class() const { return true; }

  struct GradCoef {
    R p, one_minus_p;
  };
  FL_FN GradCoef grad_coef(const RowState<R>& row, const Target<R>&, R g) const {
    return {g * row.saved[0], row.saved[1]};
  }
  template <class F>
  FL_FN F grad(F p, F, F, F, const GradCoef& c) const {
    return p * c.p;
  }
  FL_FN R grad_at_target(R, R, R, const GradCoef& c) const { return -c.p * c.one_minus_p; }
};

// w_y (1 - p)^gamma nll, with A = w_y (1 - p)^gamma (1 + gamma p nll / (1 - p)): the quotient tends to 1 as p
// does, so that nothing is singular for gamma < 1 either.
template <class R, int>
struct Focal : LossOfTargetProb<R> {
  static constexpr bool kNormCountsRows = true;
  FL_HPARAMS(gamma);
  R gamma;

  FL_FN Focal(const double* hparams, int64_t) : gamma(R(hparams[H::gamma])) {}

  FL_FN R power(R one_minus_p) const {
    if (gamma == 0) return 1;
    if (gamma == 0.5) return sqrt(one_minus_p);
    if (gamma == 1) return one_minus_p;
    if (gamma == 2) return one_minus_p * one_minus_p;
    return pow(one_minus_p, gamma);
  }
  FL_FN R project(RowState<R>& row, const NoSums&, R others, R e, const Target<R>& t) const {
    const TargetProb<R> target = target_prob(others, e, t.d, row.log_sum);
    const R p = e / (others + e), factor = power(target.one_minus_p);
    const R ratio = target.one_minus_p == 0 ? 1 : target.nll / target.one_minus_p;
    row.saved[0] = t.weight * factor * (p == 0 ? 1 : 1 + gamma * p * ratio);
    row.saved[1] = target.one_minus_p;
    return t.weight * factor * target.nll;
  }
};

// w_y (nll + epsilon (1 - p)), with A = w_y (1 + epsilon p). Where epsilon is negative the terms of either
// cancel: at -1 nothing is left of A but 1 - p, and of the loss the sum of (1 - p)^k / k from the second power on.
template <class R, int>
struct Poly1CrossEntropy : LossOfTargetProb<R> {
  FL_HPARAMS(epsilon);
  R epsilon, one_more;  // one_more = 1 + epsilon

  FL_FN Poly1CrossEntropy(const double* hparams, int64_t)
      : epsilon(R(hparams[H::epsilon])), one_more(R(1 + hparams[H::epsilon])) {}

  // nll - q of q = 1 - p: -log(1 - q) without the first term of its series.
  static FL_FN R without_first_term(R nll, R q) {
    constexpr int kTerms = sizeof(R) == 4 ? 12 : 27;
    if (q > R(0.25)) return nll - q;
    R sum = 0;
    for (int k = kTerms; k >= 2; --k) sum = sum * q + R(1) / R(k);
    return sum * q * q;
  }
  FL_FN R project(RowState<R>& row, const NoSums&, R others, R e, const Target<R>& t) const {
    const TargetProb<R> target = target_prob(others, e, t.d, row.log_sum);
    const R p = e / (others + e), q = target.one_minus_p;
    row.saved[0] = t.weight * (p < q ? 1 + epsilon * p : one_more - epsilon * q);
    row.saved[1] = q;
    if (epsilon >= 0) return t.weight * (target.nll + epsilon * q);
    return t.weight * (without_first_term(target.nll, q) + one_more * q);
  }
};

}  // namespace fastloss::inline FL_ISA

// The token losses: name of the operator and struct. A new loss is a struct, a line here, a Python function.
#define FASTLOSS_TOKEN_LOSSES(X) \
  X(cross_entropy, CrossEntropy) \
  X(softmax_focal_loss, Focal)   \
  X(poly1_cross_entropy, Poly1CrossEntropy)
// What else the row driver runs, with operators of its own.
#define FASTLOSS_ROW_KERNELS(X) \
  FASTLOSS_TOKEN_LOSSES(X) X(token_stats, TokenStats) X(cross_entropy_numbers, CrossEntropyNumbers)
