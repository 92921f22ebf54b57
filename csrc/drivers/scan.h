// The arguments of a kernel of recursions in time, on CPU and CUDA alike. Plain data: no torch.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "../math/math.h"
#include "../math/scaled.h"
#include "names.h"

namespace fastloss {

inline constexpr int kScanInputs = 4, kScanGrads = 2, kScanOutputs = 3;

struct ScanArgs {
  bool backward;
  DType dtype;                  // of every tensor but flags and offsets; each is contiguous
  int64_t rows, n;              // [rows, n], or without padding [n] with offsets
  const int64_t* offsets;       // [rows + 1]: sequence r is [offsets[r], offsets[r + 1]); or null
  const void* in[kScanInputs];  // the loss's inputs, null where absent
  const uint8_t *terminated, *truncated, *mask;  // like in; or null: no, no, yes
  const void* initial;                           // [rows]: the state behind the last step, or null: 0
  const void* grad[kScanGrads];                  // backward: of the outputs, null where there is none
  void* out[kScanOutputs];                       // outputs of the pass, null where unwanted
  void* initial_grad;                            // backward: [rows], or null
  double hparams[kMaxHparams];
};

}  // namespace fastloss

namespace fastloss::inline FL_ISA {

// A loss's recursion is affine in a state (u, w) of which u does not see w:
//   u' = decay_u u + add_u,   w' = decay_w w + mix u + add_w.
// A factor of 0 takes nothing of the state, be it NaN. Such maps compose, so steps may be taken one by one or
// joined in a tree, where a product of small factors stays greater than 0.
template <class F>
struct AffineStep {
  F decay_u, add_u, decay_w, mix, add_w;
  static FL_FN AffineStep identity() { return {F{} + 1, F{}, F{} + 1, F{}, F{}}; }
  FL_FN void apply(F& u, F& w) const {
    w = scaled(decay_w, w) + (scaled(mix, u) + add_w);
    u = scaled(decay_u, u) + add_u;
  }
  FL_FN AffineStep then(const AffineStep& s) const {  // this first, s after it
    return {product_of_factors(s.decay_u, decay_u), scaled(s.decay_u, add_u) + s.add_u,
            product_of_factors(s.decay_w, decay_w),
            product_of_factors(s.decay_w, mix) + product_of_factors(s.mix, decay_u),
            scaled(s.decay_w, add_w) + (scaled(s.mix, add_u) + s.add_w)};
  }
};

// One time step as a loss sees it. Flags are 0 or 1; where mask is 0 there is no step.
template <class F>
struct ScanStep {
  F in[kScanInputs];
  F terminated, truncated, mask;
  F grad[kScanGrads];
};

}  // namespace fastloss::inline FL_ISA
