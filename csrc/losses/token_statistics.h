// Statistics of a row of logits z: entropy, lse, log sum p^2, mean of z, and the log-probabilities of some of
// its classes. The outputs are [kOutputs + 2 K, rows]: the statistics, the K log-probabilities, and K
// flags that are 1 where the class is the most probable.
#pragma once
#include "../drivers/row_loss.h"
#include "../drivers/rows.h"

namespace fastloss::inline FL_ISA {

// Without kAll the outputs log sum p^2 and mean are 0.
template <class R, int kAll>
struct TokenStats : RowLossDefaults {
  static constexpr int kVariants = 2, kSaved = 3, kOutputs = 4;
  static constexpr bool kSoftcap = true, kGradUsesLogit = true;
  enum Output { kEntropy, kLse, kLogSumP2, kMean };
  FL_HPARAMS(all);
  R n;

  static int variant(const RowArgs& a) { return a.hparams[H::all] != 0; }
  FL_FN TokenStats(const double*, int64_t n_) : n(R(n_)) {}

  // p z is 0 where p = 0, also for z = -infinity
  template <class F>
  static FL_FN F bounded(F d) {
    return max(d, fill<F>(R(-2000)));
  }
  // The maximum is counted apart from the others: log(1 + others) stays exact when one class has nearly all
  // the probability.
  template <class F>
  struct Few {
    F others{}, top{}, ed{};
    FL_FN F total() const { return others + top; }
    FL_FN void add(F e, F d, F, F, const TokenStats&) {
      const F below = d < 0 ? e : F{};
      others += below;
      top += e - below;
      ed += e * bounded(d);
    }
    FL_FN void move(F shift, F factor, F s) {
      others = (others + top) * factor;
      top = F{};
      ed = (ed + bounded(shift) * s) * factor;
    }
  };
  template <class F>
  struct Many {
    F others{}, top{}, ed{}, e2{}, d{}, count{};
    FL_FN F total() const { return others + top; }
    FL_FN void add(F e, F d_, F w, F q, const TokenStats& l) {
      Few<F> few{others, top, ed};
      few.add(e, d_, w, q, l);
      others = few.others;
      top = few.top;
      ed = few.ed;
      e2 += e * e;
      d += d_;
      count += 1;
    }
    FL_FN void move(F shift, F factor, F s) {
      Few<F> few{others, top, ed};
      few.move(shift, factor, s);
      others = few.others;
      top = few.top;
      ed = few.ed;
      e2 *= factor * factor;
      d += shift * count;
    }
  };
  template <class F>
  using Sums = std::conditional_t<kAll != 0, Many<F>, Few<F>>;

  FL_FN R project(RowState<R>& row, const Sums<R>& sums, R, R, const Target<R>&) const {
    const R total = sums.others + sums.top;
    row.log_sum = log1p(sums.others + (sums.top - 1));
    row.saved[0] = sums.ed / total;  // E[z] - m
    row.saved[1] = row.saved[2] = 0;
    if constexpr (kAll) {
      row.saved[1] = sums.e2 / (total * total);  // sum p^2
      row.saved[2] = row.m + sums.d / n;
    }
    return 0;
  }
  FL_FN void write(const RowState<R>& row, Outputs<R> out) const {
    out[kEntropy] = row.log_sum - row.saved[0];
    out[kLse] = row.m + row.log_sum;
    out[kLogSumP2] = kAll ? log(row.saved[1]) : 0;
    out[kMean] = row.saved[2];
  }

  struct GradCoef {
    R p, pd, p2, constant;  // d/dz_j = p_j (p + pd d_j + p2 p_j) + constant, for j not in index
    R index_grad, log_sum;  // sum of the log-probabilities' upstream gradients, to be subtracted from p
  };
  FL_FN GradCoef grad_coef(const RowState<R>& row, Outputs<const R> g, int64_t num_index, R scale) const {
    GradCoef c{};
    for (int64_t k = 0; k < num_index; ++k) c.index_grad += g[kOutputs + k];
    c.index_grad *= scale;
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
    const F slope = (c.p - c.index_grad) + alone(fill<F>(c.pd), bounded(d)) + alone(fill<F>(c.p2), p);
    return alone(p, slope) + c.constant;
  }
  FL_FN R grad_at_target(R, R, R, const GradCoef&) const { return 0; }  // no class is a target
  // For a class in index, with the sum `g` of its upstream gradients; 1 - p = -expm1(log p).
  FL_FN R grad_at_index(R p, R d, R g, const GradCoef& c) const {
    return g * -expm1(d - c.log_sum) + p * ((g - c.index_grad) + c.p + c.pd * bounded(d) + c.p2 * p) +
           c.constant;
  }
};

}  // namespace fastloss::inline FL_ISA
