// Element types as the kernels see them. Half types are storage only: arithmetic is in float.
#pragma once
#include <cstdint>

namespace fastloss {

enum class DType : int { f32, f64, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace fastloss
