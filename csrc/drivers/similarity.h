// The arguments of a kernel of a matrix of similarities, on CPU and CUDA alike. Plain data: no torch.
//
//   s[i, j] = scale <x_i, y_j> + bias,   i < m, j < n
//
// is never stored: it exists only as tiles (CPU) or as blocks (CUDA). `target_col`, the ids and two flags say
// which entries are positives, negatives or left out: see EntryRule in losses/similarity.h.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "../math/math.h"
#include "names.h"

namespace fastloss {

FL_ENUM(TilePass,
        statistics,        // max and log sum exp of rows and columns; the positive's s, or the sum of these
        softmax_gradient,  // s becomes row_grad_i p_ij + col_grad_j q_ij, and positive_grad_i at positives
        pairs,             // of rows: sum over positives of softplus(lse_i - s), and of its derivative
        pairs_gradient,    // the same at negatives, -positive_grad_i sigma(lse_i - s) at positives
        sigmoid,           // of rows: sum of softplus(-+s); s becomes row_grad_i times the derivative
        hardest)  // of rows: the positive with the largest s + col_max_j, the negative with the smallest

// Arrays are of the accumulation type; null where there is none, or where a result is not wanted. What they
// hold depends on the pass. `stat`: what the pass `statistics` gave; `grad`: the loss's gradient by that; in
// capitals: what the pass writes.
//
//   array              statistics  softmax_gradient  pairs   pairs_gradient  sigmoid  hardest
//   row_max            MAX         stat              stat    stat
//   row_log_sum        LOG SUM     stat              stat    stat            SLOPE
//   row_grad                       grad              SLOPE   grad            grad
//   col_max            MAX         stat                      stat                     offset
//   col_log_sum        LOG SUM     stat                      stat
//   col_grad                       grad                      grad
//   positive           S                             LOSS                    LOSS
//   positive_grad                  grad                      grad
//   col_positive_grad              grad                      grad
//   hardest                                                                           COLUMNS
//
//   S        of the positive, or the sum over the positives
//   LOSS     sum of softplus over a row, SLOPE of its derivatives
//   offset   added to s before entries are compared
//   col_positive_grad   the column's gradient at its positives, added to that of the row; in pairs_gradient
//                       relative to the column's statistics
struct TileArgs {
  TilePass pass;
  bool labels_are_positives, positives_in_denominator;  // see EntryRule
  int64_t m, n;
  double bias;
  const int64_t* target_col;               // [m]: column of the positive, or of the row itself
  void *row_max, *row_log_sum, *row_grad;  // [m]
  void *col_max, *col_log_sum, *col_grad;  // [n]
  void *positive, *positive_grad;          // [m]
  const void* col_positive_grad;           // [n]
  int64_t* hardest;                        // [2, m]: columns, -1 where there is none

  // the same arrays by what they hold
  FL_FN void* pairs_loss() const { return positive; }
  FL_FN void* pairs_slope() const { return row_grad; }
  FL_FN void* sigmoid_loss() const { return positive; }
  FL_FN void* sigmoid_slope() const { return row_log_sum; }
  FL_FN const void* hardest_offset() const { return col_max; }
};

// CUDA: rows [row, row + rows) and columns [col, col + cols) of the matrix, whose products <x_i, y_j> lie in
// memory. Blocks come row by row, so that what is summed over several is in the order of rows and of columns.
struct TileChunk : TileArgs {
  bool is_double;            // float64, else float32: of all arrays
  const void* s;             // [rows, cols]: products, before scale and bias
  void* g;                   // a gradient pass: the gradient of s, in g_type; may be s (in place)
  DType g_type;              // that of s, or a half type
  int64_t s_pitch, g_pitch;  // elements from row to row: whole units of 16 bytes of s, from such a boundary
  const void *scale_at, *bias_at;  // one number each; the second may be null
  int64_t row, rows, col, cols;
  const int64_t *row_ids, *col_ids;  // [m], [n]; or null
  void* dots;                        // [m]: in a gradient pass the sums over a row of gradient times product
  void* part;                        // partial sums of the block: cuda::tile_partials numbers
};

}  // namespace fastloss
