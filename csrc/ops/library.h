// What every operator file needs of torch: the stable ABI, the namespace of the operators, checks,
// allocation.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "../math/dtype.h"

#ifndef FASTLOSS_NAMESPACE
#define FASTLOSS_NAMESPACE fastloss
#endif

namespace fastloss {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
      return DType::f32;
  }
}
inline ScalarType accumulation_type(DType d) {
  return d == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

// The current stream of the device that `t` is on, as a cudaStream_t.
void* current_stream(const Tensor& t);

// Bytes of output from where on the CPU writes them past the caches: about the last level that one socket
// shares among its cores.
inline constexpr int64_t kPastCache = 24 << 20;

// An uninitialised contiguous tensor on the device of `like`.
Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);
// An uninitialised tensor like `t`: its shape, dtype and (where dense) its strides. Large ones on the CPU
// come from the pool of warm pages (memory.h).
Tensor empty_like_pooled(const Tensor& t);
// The same as `empty`, from the pool where it is large.
Tensor empty_pooled(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);

}  // namespace fastloss
