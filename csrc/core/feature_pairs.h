// What a kernel that walks two tensors of rows of features together is told. Plain data: no torch.
//
// Of rows a and b the four sums <a, b>, <a, a>, <b, b> and |a - b + eps|^2, from one read; backwards, from
// their gradients, those of a and b.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fastloss {

inline constexpr int kFeatureSums = 4;

struct FeatureArgs {
  DType dtype;      // of a, b, da, db
  int64_t rows, n;  // [rows, n]
  const void *a, *b;
  double eps;
  void* sums;        // [kFeatureSums, rows] in the accumulation type, or null: backwards
  const void* grad;  // the same, of the sums
  void *da, *db;     // [rows, n]
};

}  // namespace fastloss
