// The arguments of an elementwise kernel, on CPU and CUDA alike, and the protocol of its loss. Plain data: no
// torch.
//
// A loss is a struct over the accumulation type R (float, double) and a variant:
//   kInputs, kWrt     the number of inputs, and a bit for each that is differentiable
//   kVariants, variant(hparams)    instantiations, and which one a call takes
//   kLogSum           the loss is v + log(1 + u), u in [0, 1]: a sum then takes one logarithm of a product
//   kSteps, F step<i>(const F* v, const F* t)
//                     intermediate values: t[i] from v and the steps before. The CPU driver takes one step
//                     for many elements before the next: the steps of one element are a dependency chain
//                     that out-of-order execution cannot hide
//   F operator()(const F* v, [const F* t,] F* d [, F& u])    the loss of v; d[i] is its derivative by v[i]
//   kHalfDerivatives  d[i] is half of it: a mean's 1 / n comes before the 2 of a square, which may overflow
// F is R, or a vector of R. A d that a call does not use costs nothing. The weight, the upstream gradient,
// the reduction and what it is divided by are the driver's.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "../math/math.h"
#include "names.h"
#include "rows.h"

namespace fastloss {

inline constexpr int kMaxInputs = 8;

enum class Source : int {
  element,       // of the call's dtype
  accumulation,  // of its accumulation type
  flag,          // bool: 0 or 1
  one_hot,       // from classes [n / inner], int64: 1 where i % inner is the element's class, else 0; the
                 // background is no class, whichever number it has
  not_ignored,   // from the same classes: 0 where they are ignore_index, else 1
};

// Element i of an input is p[i / inner % period]: broadcast without being stored so.
struct ElementInput {
  const void* p = nullptr;  // null: absent
  Source source = Source::element;
  int64_t inner = 1, period = 1;
};

struct ElementArgs {
  DType dtype;  // of the inputs, and of the gradients
  int variant;
  int64_t n;  // elements
  ElementInput inputs[kMaxInputs];
  ElementInput weight;                     // an element of weight 0 counts nothing, whatever its inputs are
  ElementInput upstream;                   // gradient of the result; absent: 1
  int64_t ignore_index, background_index;  // of one_hot and not_ignored
  const void* norm;         // a reduced loss is divided by it: one number of the accumulation type, or null
  double divisor, scale;    // and by this one; 1 / divisor
  void* out;                // [n] losses, or null where they are reduced
  bool out_acc;             // out or result are of the accumulation type
  double* partial;          // [element_blocks(n)] sums of blocks, or null
  void* result;             // CUDA: their sum, divided
  void* dx[kMaxInputs];     // [n] gradients; null where not wanted
  bool past_cache;          // CPU: outputs are too large for the caches, write around them
  bool skip_unit_upstream;  // do nothing if upstream is 1
  double hparams[kMaxHparams];
};

// A tensor without gaps, to be multiplied by one number of its accumulation type.
struct ScaleArgs {
  DType dtype;
  int64_t n;
  void* p;
  const void* factor;
};

// Sums: each block of elements is summed on its own, then the blocks' sums are added in order.
inline constexpr int64_t kElementBlock = 1024;
inline int64_t element_blocks(int64_t n) { return (n + kElementBlock - 1) / kElementBlock; }

inline namespace FL_ISA {

template <class Loss>
inline constexpr int kStepsOf = [] {
  if constexpr (requires { Loss::kSteps; }) return Loss::kSteps;
  return 0;
}();
template <int kFrom = 0, class Loss, class F>
FL_FN void take_steps(const Loss& loss, const F* v, F* t) {
  if constexpr (kFrom < kStepsOf<Loss>) {
    t[kFrom] = loss.template step<kFrom>(v, t);
    take_steps<kFrom + 1>(loss, v, t);
  }
}
// The gradient of an input from the loss's derivative by it.
template <class Loss, class F>
FL_FN F gradient_of(F d, F upstream) {
  const F dx = d * upstream;
  if constexpr (requires { Loss::kHalfDerivatives; }) return dx + dx;
  return dx;
}
// The loss of v with its steps t; u of a log-sum.
template <class Loss, class F>
FL_FN F evaluate(const Loss& loss, const F* v, const F* t, F* d, F& u) {
  if constexpr (kStepsOf<Loss> != 0 && Loss::kLogSum) return loss(v, t, d, u);
  if constexpr (kStepsOf<Loss> != 0 && !Loss::kLogSum) return loss(v, t, d);
  if constexpr (kStepsOf<Loss> == 0 && Loss::kLogSum) return loss(v, d, u);
  if constexpr (kStepsOf<Loss> == 0 && !Loss::kLogSum) return loss(v, d);
}

}  // namespace FL_ISA

}  // namespace fastloss
