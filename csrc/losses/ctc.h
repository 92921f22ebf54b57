// Connectionist temporal classification. The target, with blanks around its labels, is a row of 2 L + 1
// positions; an alignment enters at the first blank or label, each step stays, goes on by one, or skips a
// blank between different labels, and ends at the last label or blank. In logarithms, with y_t(s) the input
// for position s at step t less its maximum over the positions, so that sums stay small,
//   alpha_t(s) = y_t(s) + log_sum(alpha_{t-1}(s), alpha_{t-1}(s - 1), if skips(s) alpha_{t-1}(s - 2))
//   ahead_t(s) = log_sum(beta_{t+1}(s), beta_{t+1}(s + 1), if skips(s + 2) beta_{t+1}(s + 2))
//   beta_t(s) = y_t(s) + ahead_t(s)
//   likelihood = log_sum(alpha at the end), the loss's negative but for the maxima
//   posterior_t(s) = exp(alpha_t(s) + ahead_t(s) - likelihood)
//   d loss / d input_t(k) = - sum of posterior_t(s) over the s of class k;   of logits p_t(k) more
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "../math/math.h"

namespace fastloss {

// The arguments of the CTC kernels, on CPU and CUDA alike. Plain data: no torch. Arrays that are not of
// `dtype` are of its accumulation type.
struct AlignmentArgs {
  bool backward;
  bool from_logits;    // input is not normalised: log_softmax is fused
  bool zero_infinity;  // a target without an alignment has loss 0
  DType dtype;         // of input and gradient
  int64_t steps, batch, classes, blank;
  int64_t width;                                  // of the targets
  const void* input;                              // [steps, batch, classes], classes without gaps
  int64_t input_strides[2], gradient_strides[2];  // of steps and of sequences
  const int64_t* targets;                         // [batch, width]
  const int64_t *input_lengths, *target_lengths;  // [batch]
  void* rows;            // [2 if from_logits else 1, steps, batch]: what is taken off the input, and
                         //   the log of the sum of e^input
  void* alpha;           // [batch, steps, 2 width + 1]
  void* loss;            // [batch]
  const void* upstream;  // backward: [batch]
  void* posterior;       // backward, on a GPU: like alpha, scratch
  void* betas;           // backward, on a GPU: [batch, 2, 2 width + 1], scratch
  int64_t* links;        // backward, on a GPU: like targets, scratch
  void* gradient;        // backward: [steps, batch, classes], classes without gaps
};

}  // namespace fastloss

namespace fastloss::inline FL_ISA {

template <class F>
FL_FN F log_sum(F a, F b, F c) {
  const F top = max(max(a, b), c), m = select(top > -INFINITY, top, F{});
  return m + log(exp(a - m) + exp(b - m) + exp(c - m));
}

// 0 where the end cannot be reached, even if y is NaN.
template <class F>
FL_FN F beta(F ahead, F y) {
  return select(ahead == -INFINITY, ahead, ahead + y);
}
template <class F>
FL_FN F posterior(F alpha, F ahead, scalar_t<F> likelihood) {
  const F p = exp(alpha + ahead - likelihood);  // NaN stays on paths that exist
  return select(alpha == -INFINITY, F{}, select(ahead == -INFINITY, F{}, p));
}

// One target and its lengths. Lengths that do not fit the arrays make it invalid, and count as 0.
struct AlignedTarget {
  const int64_t* labels;
  int64_t steps, length, positions, blank, classes;
  bool valid;

  FL_FN AlignedTarget(const AlignmentArgs& a, int64_t n)
      : labels(a.targets + n * a.width), blank(a.blank), classes(a.classes) {
    const int64_t t = a.input_lengths[n], l = a.target_lengths[n];
    valid = t >= 0 && t <= a.steps && l >= 0 && l <= a.width;
    steps = valid ? t : 0;
    length = valid ? l : 0;
    positions = 2 * length + 1;
  }
  FL_FN int64_t label(int64_t s) const { return s % 2 ? labels[s / 2] : blank; }
  FL_FN bool in_range(int64_t k) const { return k >= 0 && k < classes; }
  FL_FN bool skips(int64_t s) const {
    return s % 2 == 1 && s >= 3 && s < positions && labels[s / 2] != labels[s / 2 - 1];
  }
  // From the alphas of the last step; null if there are no steps.
  template <class R>
  FL_FN R likelihood(const R* last) const {
    const R nothing = -R(INFINITY);
    if (!valid) return R(NAN);
    if (steps == 0) return length == 0 ? R(0) : nothing;
    return log_sum(last[positions - 1], length > 0 ? last[positions - 2] : nothing, nothing);
  }
};

}  // namespace fastloss::inline FL_ISA
