// What a kernel of rankings is told, on CPU and CUDA alike. Plain data: no torch.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "../math/scalar_math.h"

namespace fastloss {

enum class Ranking : int { bradley_terry, plackett_luce };

struct RankingArgs {
  Ranking kind;
  bool backward;
  DType dtype;      // of rewards and their gradient
  int64_t rows, n;  // [rows, n], contiguous
  const void* rewards;
  const void* ranks;     // in the accumulation type; NaN: not ranked
  void *loss, *pairs;    // [rows] in the accumulation type: forward's results
  void* state;           // [rows, state_width] in it: what backward needs
  const void* upstream;  // backward: [rows] in it
  void* gradient;        // backward: [rows, n]
};

// The number of pairs of a row, and before it for plackett_luce what each item gave.
FL_FN int64_t state_width(const RankingArgs& a) { return a.kind == Ranking::plackett_luce ? a.n + 1 : 1; }

}  // namespace fastloss
