// What a driver that walks rows of logits (cpu/kernels/rows.h, cuda/kernels/rows.cuh) and a loss
// (losses/classification.h) say to each other.
//
// A driver reads a row once and keeps, relative to a running maximum m, the sum of exp(z - m) over all
// classes but the target: what is left when the target wins by a wide margin is then still exact.
// A loss says the rest:
//   Sums             what else to add up over the row, from e = exp(z - m) (0 at the target), d = z - m, the
//                    class weight w and the soft target q; `move` follows m to a new maximum: d += shift,
//                    e *= factor
//   project          all that -> the row's loss and the kSaved numbers that its gradient needs
//   grad_coef        what `grad` needs of one row, times the row's upstream gradient g
//   grad             g * d loss / d z_j for every class, from p = softmax(z)_j
//   grad_at_target   the same for the target's class, where p - 1 would cancel
#pragma once
#include "../math/math.h"

namespace fastloss::inline FL_ISA {

// a * b that a GPU rounds for itself, so that all copies of a loop give the same bits: its assembler folds a
// product into a sum in one copy and not in another. Elsewhere, and for vectors, a plain product.
template <class F>
FL_FN F alone(F a, F b) {
  return a * b;
}
#ifdef __CUDA_ARCH__
template <>
FL_FN float alone(float a, float b) {
  return __fmul_rn(a, b);
}
template <>
FL_FN double alone(double a, double b) {
  return __dmul_rn(a, b);
}
#endif

// What a loss does not say otherwise.
struct RowLossDefaults {
  static constexpr int kVariants = 1;             // instantiations, of which `variant` chooses
  static constexpr int kPlanes = 0;               // > 0: several results for a row, see Planes
  static constexpr int kSaved = 0;                // numbers of a row that its gradient needs
  static constexpr bool kSoftcap = false;         // logits may be capped
  static constexpr bool kSideStreams = false;     // `w` and `q` are read for every class
  static constexpr bool kGradUsesLogit = false;   // `grad` uses z - m
  static constexpr bool kProportional = false;    // `grad` is p * coef.p
  static constexpr bool kNumbers = false;         // losses/number_token.h adds a term to some rows
  static constexpr bool kNormCountsRows = false;  // "mean" counts rows, whatever their class weights
};

// A row's numbers where each kind of number has an array of its own: result i stands i * stride further on. A
// loss with planes has `write` for its results in place of a value from `project`, and a `grad_coef` that
// takes their upstream gradients; the log-probabilities of the classes asked for are the driver's.
template <class R>
struct Planes {
  R* first;
  int64_t stride;
  FL_FN R& operator[](int64_t i) const { return first[i * stride]; }
};

template <class R>
struct RowState {
  R m;         // maximum of z
  R log_sum;   // log sum exp(z - m); kept apart from m: their sum in one float loses small losses
  R saved[4];  // the loss's own
};

// A row's state in memory is m, log_sum, k (the row's weight by the norm) and what the loss saves: as many
// numbers for all variants of a loss, so that its shape depends on nothing but the loss.
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

struct NoSums {
  template <class... Args>
  FL_FN void add(Args...) {}
  template <class... Args>
  FL_FN void move(Args...) {}
};

// -log p and 1 - p of a target with e = exp(d), from the sum over the others.
template <class R>
struct TargetProb {
  R nll, one_minus_p;
};
template <class R>
FL_FN TargetProb<R> target_prob(R others, R e, R d, R log_sum) {
  return {others < e ? log1p(others / e) : log_sum - d, others / (others + e)};
}

}  // namespace fastloss::inline FL_ISA
