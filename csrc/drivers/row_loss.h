// The protocol between the row drivers (cpu/kernels/rows.h, cuda/kernels/rows.cuh) and a loss
// (losses/classification.h).
//
// A driver reads a row once and accumulates, relative to a running maximum m, the sum of exp(z - m) over all
// classes but the target: so 1 - p stays exact when the target's p is close to 1. A loss defines
//   Sums             what else to accumulate over the row, from e = exp(z - m) (0 at the target), d = z - m,
//                    the class weight w and the soft target q; `move` follows m to a new maximum:
//                    d += shift, e *= factor
//   project          from all these the row's loss and the kSaved numbers that its gradient needs
//   grad_coef        what `grad` needs of one row, times the row's upstream gradient g
//   grad             g * d loss / d z_j for every class, from p = softmax(z)_j
//   grad_at_target   the same for the target's class, where p - 1 would cancel
#pragma once
#include <limits>

#include "../math/math.h"

namespace fastloss::inline FL_ISA {

// Defaults of a loss.
struct RowLossDefaults {
  static constexpr int kVariants = 1;             // instantiations, chosen at run time by `variant`
  static constexpr int kOutputs = 0;              // > 0: several outputs for each row, see Outputs
  static constexpr int kSaved = 0;                // numbers of a row that its gradient needs
  static constexpr bool kSoftcap = false;         // supports cap * tanh(z / cap)
  static constexpr bool kSideStreams = false;     // `w` and `q` are read for every class
  static constexpr bool kGradUsesLogit = false;   // `grad` uses z - m
  static constexpr bool kProportional = false;    // `grad` is p * coef.p
  static constexpr bool kNumberTokens = false;    // losses/number_token.h adds a term to some rows
  static constexpr bool kNormCountsRows = false;  // "mean" counts rows, whatever their class weights

  // Whether a row is weighed by its target's class alone: of weight 0, it does not count, whatever it holds.
  FL_FN bool weighed_by_class() const { return false; }
};

// The outputs of one row, stored as a structure of arrays [num_outputs, rows]: output i is first[i *
// stride]. A loss with kOutputs has `write` for its outputs instead of a value from `project`, and its
// `grad_coef` takes their upstream gradients. The log-probabilities of the classes in RowArgs::index follow
// these outputs; the driver computes them, and their gradient with the loss's `grad_at_index`.
template <class R>
struct Outputs {
  R* first;
  int64_t stride;
  FL_FN R& operator[](int64_t i) const { return first[i * stride]; }
};

template <class R>
struct RowState {
  R m;         // maximum of z
  R log_sum;   // log sum exp(z - m); kept apart from m: their sum in one float loses small losses
  R saved[4];  // written by the loss's `project`, the first kSaved
};

// A row's state in memory is m, log_sum, k (the row's weight over the norm) and what the loss saves. All
// variants of a loss have the same state_width, so that the shape depends on the loss alone.
inline constexpr int kStateHead = 3;
template <template <class, int> class Loss, int kVariant = 0>
constexpr int saved_numbers() {
  int count = Loss<float, kVariant>::kSaved;
  if constexpr (kVariant + 1 < Loss<float, 0>::kVariants) {
    const int others = saved_numbers<Loss, kVariant + 1>();
    if (others > count) count = others;
  }
  return count;
}

template <class R>
struct Target {
  bool hard;  // false: no single class is the target
  R d;        // z - m of the target's class
  R weight;   // its class weight
};

// How far the maximum moved, as `move` takes it: from -1e38 to 3e38 is farther than float32 reaches, and
// -infinity times a sum that is still 0 would be NaN.
template <class R>
FL_FN R finite_shift(R shift) {
  return max(shift, std::numeric_limits<R>::lowest());
}

struct NoSums {
  template <class... Args>
  FL_FN void add(Args...) {}
  template <class... Args>
  FL_FN void move(Args...) {}
};

// -log p and 1 - p of a target with e = exp(d), from the sum over the others. Of 1 - p powers are taken, which
// multiply its error: it comes from the smaller of the two sums, whose own error is a small part of it.
template <class R>
struct TargetProb {
  R nll, one_minus_p;
};
template <class R>
FL_FN TargetProb<R> target_prob(R others, R e, R d, R log_sum) {
  const R total = others + e;
  return {others < e ? log1p(others / e) : log_sum - d, others < e ? others / total : 1 - e / total};
}

}  // namespace fastloss::inline FL_ISA
