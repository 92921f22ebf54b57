// What a kernel that walks two or three tensors of rows of features together is told. Plain data: no torch.
//
// Of row a and of each other row b the four sums <a, b>, <a, a>, <b, b> and |a - b + eps|^2, from one read;
// backwards, from their gradients, those of all rows, written once.
#pragma once
#include <cstdint>

#include "../math/dtype.h"

namespace fastloss {

inline constexpr int kFeatureSums = 4, kMaxOthers = 2;

struct FeatureArgs {
  DType dtype;      // of rows and their gradients
  int64_t rows, n;  // [rows, n]
  int others;       // how many tensors a is compared with
  const void* a;
  const void* other[kMaxOthers];
  double eps;
  void* sums;        // [others, kFeatureSums, rows] in the accumulation type, or null: backwards
  const void* grad;  // the same, of the sums
  void* da;          // [rows, n]
  void* d_other[kMaxOthers];
  bool past_cache;  // gradients are larger than the caches
};

}  // namespace fastloss
