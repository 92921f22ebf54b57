// Statistics of a row of logits z: entropy, lse, log sum p^2, mean of z, and the log-probabilities of some of
// its classes. Each is a plane of the output [kPlanes + 2 K, rows]: the K log-probabilities follow the
// statistics, after them K flags that say whether the class is the most probable.
#pragma once
#include "../drivers/row_loss.h"
#include "../drivers/rows.h"

namespace fastloss::inline FL_ISA {

// Without kAll the planes of log sum p^2 and of the mean hold 0.
template <class R, int kAll>
struct TokenStats : RowLossDefaults {
  static constexpr int kVariants = 2, kSaved = 3, kPlanes = 4;
  static constexpr bool kSoftcap = true, kGradUsesLogit = true;
  enum Plane { kEntropy, kLse, kLogSumP2, kMean };
  FL_HPARAMS(all);
  R n;

  static int variant(const RowArgs& a) { return a.hparams[H::all] != 0; }
  FL_FN TokenStats(const double*, int64_t n_) : n(R(n_)) {}

  // p z is 0 where p is, also for z = -infinity
  template <class F>
  static FL_FN F bounded(F d) {
    return max(d, fill<F>(R(-2000)));
  }
  // The largest elements are counted apart from the rest: log(1 + rest) stays exact when one class has nearly
  // all the probability.
  template <class F>
  struct Few {
    F rest{}, top{}, ed{};
    FL_FN F total() const { return rest + top; }
    FL_FN void add(F e, F d, F, F, const TokenStats&) {
      const F below = d < 0 ? e : F{};
      rest += below;
      top += e - below;
      ed += e * bounded(d);
    }
    FL_FN void move(F shift, F factor, F s) {
      rest = (rest + top) * factor;
      top = F{};
      ed = (ed + shift * s) * factor;
    }
  };
  template <class F>
  struct Many {
    F rest{}, top{}, ed{}, e2{}, d{}, count{};
    FL_FN F total() const { return rest + top; }
    FL_FN void add(F e, F d_, F w, F q, const TokenStats& l) {
      Few<F> few{rest, top, ed};
      few.add(e, d_, w, q, l);
      rest = few.rest;
      top = few.top;
      ed = few.ed;
      e2 += e * e;
      d += d_;
      count += 1;
    }
    FL_FN void move(F shift, F factor, F s) {
      Few<F> few{rest, top, ed};
      few.move(shift, factor, s);
      rest = few.rest;
      top = few.top;
      ed = few.ed;
      e2 *= factor * factor;
      d += shift * count;
    }
  };
  template <class F>
  using Sums = std::conditional_t<kAll != 0, Many<F>, Few<F>>;

  FL_FN R project(RowState<R>& row, const Sums<R>& sums, R, R, const Target<R>&) const {
    const R total = sums.rest + sums.top;
    row.log_sum = log1p(sums.rest + (sums.top - 1));
    row.saved[0] = sums.ed / total;  // E[z] - m
    row.saved[1] = row.saved[2] = 0;
    if constexpr (kAll) {
      row.saved[1] = sums.e2 / (total * total);  // sum p^2
      row.saved[2] = row.m + sums.d / n;
    }
    return 0;
  }
  FL_FN void write(const RowState<R>& row, Planes<R> out) const {
    out[kEntropy] = row.log_sum - row.saved[0];
    out[kLse] = row.m + row.log_sum;
    out[kLogSumP2] = kAll ? log(row.saved[1]) : 0;
    out[kMean] = row.saved[2];
  }

  struct GradCoef {
    R p, pd, p2, constant;  // d/dz_j = p_j (p + pd d_j + p2 p_j) + constant, where j is no class asked for
    R asked, log_sum;       // p without, and: the sum of the gradients of the log-probabilities
  };
  FL_FN GradCoef grad_coef(const RowState<R>& row, Planes<const R> g, int64_t asked, R scale) const {
    GradCoef c{};
    for (int64_t k = 0; k < asked; ++k) c.asked += g[kPlanes + k];
    c.asked *= scale;
    c.pd = -scale * g[kEntropy];
    c.p = scale * (g[kEntropy] * row.saved[0] + g[kLse]);
    if constexpr (kAll) {
      c.p -= 2 * scale * g[kLogSumP2];
      c.p2 = 2 * scale * g[kLogSumP2] / row.saved[1];
      c.constant = scale * g[kMean] / n;
    }
    c.log_sum = row.log_sum;
    return c;
  }
  template <class F>
  FL_FN F grad(F p, F d, F, F, const GradCoef& c) const {
    const F slope = (c.p - c.asked) + alone(fill<F>(c.pd), bounded(d)) + alone(fill<F>(c.p2), p);
    return alone(p, slope) + c.constant;
  }
  FL_FN R grad_at_target(R, R, R, const GradCoef&) const { return 0; }  // no class is a target
  // Of a class asked for, with the sum `g` of its gradients; 1 - p = -expm1(log p).
  FL_FN R asked_for(R p, R d, R g, const GradCoef& c) const {
    return g * -expm1(d - c.log_sum) + p * ((g - c.asked) + c.p + c.pd * bounded(d) + c.p2 * p) + c.constant;
  }
};

}  // namespace fastloss::inline FL_ISA
