// What a kernel that walks a matrix of similarities is told, on CPU and CUDA alike. Plain data: no torch.
//
//   s[i, j] = scale <x_i, y_j> + bias,   i < m, j < n
//
// exists only as tiles (CPU) or as blocks (CUDA). What an entry counts as, `mark` and ids say: an entry is
// marked if j == mark[i], else it is equal if row_ids[i] == col_ids[j], else it is a negative.
//
//   same_is_positive   marked entry              equal entries                  all others
//   false              the row's positive        left out (false negatives)     negatives
//   true               left out (itself)         positives (of its class)       negatives
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "names.h"

namespace fastloss {

FL_ENUM(TilePass,
        statistics,        // max and log sum exp of rows and columns; the positive's s, or the sum of these
        softmax_gradient,  // s becomes row_grad_i p_ij + col_grad_j q_ij, and positive_grad_i at positives
        pairs,             // of rows: sum over positives of softplus(lse_i - s), and of its derivative
        pairs_gradient,    // the same at negatives, -positive_grad_i sigma(lse_i - s) at positives
        sigmoid,           // of rows: sum of softplus(-+s); s becomes row_grad_i times the derivative
        hardest)  // of rows: the positive with the largest s + col_max_j, the negative with the smallest

// Arrays are of the accumulation type; null where there is none.
struct TileArgs {
  TilePass pass;
  bool same_is_positive, with_positives;  // the second: statistics are over positives too
  int64_t m, n;
  double bias;
  const int64_t* mark;                     // [m]
  void *row_max, *row_log_sum, *row_grad;  // [m]
  void *col_max, *col_log_sum, *col_grad;  // [n]
  void *positive, *positive_grad;          // [m]
  const void* col_positive_grad;  // [n]: added to positive_grad; a pair's has the column's statistics
  int64_t* hardest;               // [2, m]: columns, -1 where there is none
};

// CUDA: rows [row, row + rows) and columns [col, col + cols) of the matrix, whose products <x_i, y_j> lie in
// memory. Blocks come row by row, so that what is summed over several is in the order of rows and of columns.
struct TileChunk : TileArgs {
  bool wide;                 // float64, else float32: of all arrays
  const void* s;             // [rows, cols]: products, before scale and bias
  void* g;                   // a gradient pass: the gradient of s, as numbers of g_type; may be s itself
  DType g_type;              // that of s, or a half type
  int64_t s_pitch, g_pitch;  // elements from row to row: whole units of 16 bytes of s, from such a boundary
  const void *scale_at, *bias_at;  // one number each; the second may be null
  int64_t row, rows, col, cols;
  const int64_t *row_ids, *col_ids;  // [m], [n]; or null
  void* dots;                        // [m]: of a gradient pass the sums of gradient times product
  void* part;                        // sums of parts of the block: cuda::tile_partials numbers
};

}  // namespace fastloss
