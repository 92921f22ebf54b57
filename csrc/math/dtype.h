// Element types as the kernels see them. Half-precision dtypes are storage only: arithmetic is in float.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace fastloss {

enum class DType : int { f32, f64, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// body.operator()<T>() for the type of that name; a device has half-precision types of its own. With FL_TWO_DTYPES
// only float32 and bfloat16 are compiled, for builds that take long.
template <class Brain = BFloat16, class Short = Half, class Body>
auto with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body.template operator()<float>();
    case DType::bf16:
      return body.template operator()<Brain>();
#ifdef FL_TWO_DTYPES
    default:
      abort();
#else
    case DType::f16:
      return body.template operator()<Short>();
    case DType::f64:
      return body.template operator()<double>();
#endif
  }
  __builtin_unreachable();
}

}  // namespace fastloss
