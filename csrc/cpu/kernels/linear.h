// A linear layer fused with a row loss, on the CPU: three GEMMs over a chunk of rows. The logits of all rows
// are never stored: one buffer holds those of a chunk and is reused for the next.
#pragma once
#include <cstdint>

#include "../../math/dtype.h"
#include "../dispatch.h"

namespace fastloss::cpu {

// All arrays but w are of the accumulation type and contiguous.
struct LinearArgs {
  DType dtype;                // of w
  int64_t rows, n, features;  // of the chunk: rows, classes, features
  const void* x;              // [rows, features]
  void* panels;               // workspace of packed_bytes(): x, packed by `pack_left` or `pack_right`
  const void* w;              // [n, features], any strides
  int64_t w_row, w_column;
  const void* bias;                 // [n] or null
  void* logits;                     // [rows, n]: logits, which the row loss turns into their gradient
  void* dx;                         // [rows, features]
  void* dw;                         // [n, features]
  void* db;                         // [n] or null
  bool add;                         // dw and db accumulate
  int64_t tile_rows, tile_columns;  // of dx that one task computes; no result depends on them
};

// Rows and classes of a task of `logits` and `dw`; the depth of a panel, over which products are summed
// before they are added to the result.
inline constexpr int64_t kClassBlock = 384, kRowBlock = 384, kDepth = 384;

struct LinearKernels {
  using Kernel = void (*)(const LinearArgs&, int64_t begin, int64_t end);
  int64_t (*packed_bytes)(const LinearArgs&);
  Kernel pack_left, pack_right;  // x, by blocks of kRowBlock rows
  Kernel logits;                 // x w^T + bias, by blocks of kClassBlock classes; after pack_left
  Kernel dx;                     // logits w, by tiles
  Kernel dw;  // logits^T x and the sum of logits, by blocks of kClassBlock; after pack_right
  // out[i] = factor * in[i], from the accumulation type to dtype; in place where these are the same
  void (*scale)(const void* in, double factor, DType dtype, void* out, int64_t begin, int64_t end);
};

FASTLOSS_PER_ISA(LinearKernels, linear_kernels)
extern const LinearKernels linear_kernels_amx;  // used together with those of avx512
inline const LinearKernels& best_linear_kernels() {
  return amx() ? linear_kernels_amx : linear_kernels.best();
}

}  // namespace fastloss::cpu
