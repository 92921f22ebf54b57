// The arguments of a row kernel, on CPU and CUDA alike. Plain data: no torch, no templates.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "names.h"

namespace fastloss {

// Where the rows of a tensor lie, in elements: row r starts at
//   (r / inner) * outer_stride + (r % inner) * inner_stride
// and its classes are class_stride apart. [N, C] has inner = 1; [N, C, d1, ...] has inner = d1 * ...
struct RowLayout {
  int64_t inner = 1, outer_stride = 0, inner_stride = 0, class_stride = 1;
#if defined(__CUDACC__)
  __host__ __device__
#endif
      int64_t start(int64_t r) const {
    if (inner == 1) return r * outer_stride;
    if ((r | inner) >> 32) return r / inner * outer_stride + r % inner * inner_stride;
    // the same by 32-bit integers, which GPUs divide in a fifth of the instructions
    const uint32_t row = static_cast<uint32_t>(r), of = static_cast<uint32_t>(inner);
    return int64_t{row / of} * outer_stride + int64_t{row % of} * inner_stride;
  }
};

enum class RowPass : int {
  forward,           // statistics and loss
  forward_gradient,  // the same, fused with the gradient for an upstream gradient of 1: the row is read once
  backward           // the gradient from the saved statistics
};

// Sums over rows on a GPU: one block adds up to kRowsOfBlock rows. More rows are added by several blocks,
// which leave at most kRowPartials partial sums.
inline constexpr int64_t kRowsOfBlock = 4096, kRowPartials = 256;

struct RowArgs {
  RowPass pass;
  DType dtype;  // of x, dx and q
  int variant;  // which instantiation of the loss
  int64_t rows, n;
  const void* x;  // logits [rows, n]
  RowLayout x_layout;
  void* dx;  // their gradient, or null; may be x (in place)
  RowLayout dx_layout;
  const int64_t* target;  // [rows], or null for soft targets
  const void* q;          // soft targets, laid out as q_layout, or null
  RowLayout q_layout;
  const int64_t* index;      // [rows, num_index]: classes whose log-probabilities are returned, or null
  int64_t num_index;         // classes for each row
  int64_t num_outputs;       // a loss with kOutputs: loss and upstream are [num_outputs, rows]
  const void* class_weight;  // [n] in the accumulation type, or null
  const void* row_weight;    // [rows] in the accumulation type, or null
  int64_t ignore_index;
  bool norm_counts_rows;  // the norm leaves class weights out
  const void* norm;       // one number of the accumulation type that divides every row's weight, or null
  void* state;            // [rows, state_width] in the accumulation type: forward writes it for backward
  int64_t state_width;
  void* loss;                   // [rows] in the accumulation type; not divided by norm
  double* partial;              // CUDA: [kRowPartials] for the sums over rows, or null: one block adds all
  bool narrow_result;           // CUDA: row_reduce leaves its result in dtype
  const void* upstream;         // backward: gradient of the result, in the accumulation type,
  int64_t upstream_stride;      //   0 for one number or 1 for one a row
  bool narrow_upstream;         // CUDA: it is one number of dtype
  bool skip_unit_upstream;      // backward: do nothing if upstream[0] is 1
  bool past_cache;              // CPU: dx is too large for the caches, write around them
  double logit_scale, softcap;  // softcap 0: none
  // a loss with kNumberTokens; a label may be one of num_number_tokens classes:
  const int64_t* number_ids;  // [num_number_tokens] classes, ascending
  int64_t num_number_tokens;
  const void* number_table;         // [num_number_tokens, num_number_tokens] distances, accumulation type
  const void* number_max_distance;  // the largest distance: one number of the accumulation type
  const int64_t* number_position;   // [rows]: where the label is in number_ids
  const void* number_weight;        // [rows] in the accumulation type, 0 where the label is no number
  double hparams[kMaxHparams];      // in the order of the loss's FL_HPARAMS
};

}  // namespace fastloss
