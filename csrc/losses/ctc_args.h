// What a kernel of alignments (CTC) is told, on CPU and CUDA alike. Plain data: no torch.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "../math/scalar_math.h"

namespace fastloss {

// Everything that is not of `dtype` is in its accumulation type.
struct AlignmentArgs {
  bool backward;
  bool from_logits;    // the input's rows are to be normalised
  bool zero_infinity;  // a target without an alignment counts 0
  DType dtype;         // of input and gradient
  int64_t steps, batch, classes, blank;
  int64_t width;                                  // of the targets
  const void* input;                              // [steps, batch, classes]
  const int64_t* targets;                         // [batch, width]
  const int64_t *input_lengths, *target_lengths;  // [batch]
  void* rows;   // [2 if from_logits else 1, steps, batch]: what is taken off the input, the log of the sum of
                // e^input
  void* alpha;  // [batch, steps, 2 width + 1]
  void* loss;   // [batch]
  const void* upstream;  // backward: [batch]
  void* posterior;       // backward, on a GPU: like alpha, scratch
  void* betas;           // backward, on a GPU: [batch, 2, 2 width + 1], scratch
  int64_t* links;        // backward, on a GPU: like targets, scratch
  void* gradient;        // backward: like input
};

}  // namespace fastloss
