// What operators share: torch's stable ABI and the operators' namespace, checks, memory, conversion of
// tensors for the kernels, launches on a GPU, and registration.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/launchers.h"
#include "../drivers/names.h"
#include "../math/dtype.h"

#ifndef FASTLOSS_NAMESPACE
#define FASTLOSS_NAMESPACE fastloss
#endif

namespace fastloss {

using torch::stable::Tensor;
using torch::stable::detail::StableLibrary;
using ScalarType = torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using OptionalTensor = std::optional<Tensor>;

FL_ENUM(Reduction, none, mean, sum)
using Hparams = std::vector<double>;

// ---- errors

template <class Error, class... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}
// Users read these messages: they say what was expected, and unlike STD_TORCH_CHECK's not where in the source.
// A RuntimeError in Python, and an IndexError.
#define FL_CHECK(condition, ...)                          \
  do {                                                    \
    if (!(condition)) [[unlikely]]                        \
      ::fastloss::raise<std::runtime_error>(__VA_ARGS__); \
  } while (false)
#define FL_CHECK_INDEX(condition, ...)                   \
  do {                                                   \
    if (!(condition)) [[unlikely]]                       \
      ::fastloss::raise<std::out_of_range>(__VA_ARGS__); \
  } while (false)

// ---- dtypes

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
      FL_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
      return DType::f32;
  }
}
inline ScalarType accumulation_type(DType d) {
  return d == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}
inline Tensor contiguous_as(const Tensor& t, ScalarType type) {
  const Tensor typed = as_type(t, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

// ---- what Python passes as numbers

inline void check_choice(double value, const char* names, const char* argument) {
  FL_CHECK(value >= 0 && value < count_of(names) && value == static_cast<int>(value), argument,
           ": expected the place of one of ", names, ", got ", value);
}
template <class Enum>
Enum enum_of(int64_t value, const char* argument) {
  check_choice(static_cast<double>(value), names_of(Enum{}), argument);
  return static_cast<Enum>(value);
}
inline void check_hparams(const Hparams& hparams, int count) {
  FL_CHECK(static_cast<int>(hparams.size()) == count, "hparams: expected ", count, " numbers, got ",
           hparams.size());
}

// ---- memory

// Outputs of at least so many bytes are written with streaming stores on the CPU: about the size of a
// socket's last level cache.
inline constexpr int64_t kPastCache = 24 << 20;

// An uninitialised contiguous tensor on the device of `like`.
Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype);
// The same; large ones on the CPU come from the pool of warm pages (cpu/pool.h), unless it is disabled.
Tensor empty_pooled(const Tensor& like, Sizes sizes, ScalarType dtype);
// The same, with the shape, the dtype and (if dense) the strides of `t`.
Tensor empty_like_pooled(const Tensor& t);

// ---- where a kernel runs

#if defined(FL_SIMT)  // the CUDA kernels, executed on the CPU
inline bool on_cuda(const Tensor&) { return true; }
#else
inline bool on_cuda(const Tensor& t) { return !t.is_cpu(); }
#endif

// A function of cuda/launchers.h as launch_on_cuda takes it; null in a build without CUDA.
#if defined(FASTLOSS_CUDA) || defined(FL_SIMT)
#define FASTLOSS_CUDA_FUNCTION(name) (&cuda::name)
#else
#define FASTLOSS_CUDA_FUNCTION(name) (static_cast<decltype(&cuda::name)>(nullptr))
#endif

// The error for CUDA tensors in a build without CUDA.
[[noreturn]] void raise_no_cuda();

// function(args...): a query of cuda/launchers.h that launches nothing.
template <class Result, class... Parameters, class... Args>
Result call_cuda(Result (*function)(Parameters...), const Args&... args) {
  if (!function) raise_no_cuda();
  return function(args...);
}

// Makes the device of `t` the current one for its lifetime.
class DeviceScope {
#if !defined(FL_SIMT)
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  explicit DeviceScope(const Tensor& t) : guard_(t.get_device_index()), stream_(current_stream(t)) {}
#else
 public:
  explicit DeviceScope(const Tensor&) {}
#endif
  // launcher(args..., the device's current stream)
  template <class... Parameters, class... Args>
  void launch(void (*launcher)(Parameters...), const Args&... args) const {
    if (!launcher) raise_no_cuda();
    launcher(args..., stream_);
  }

 private:
  static void* current_stream(const Tensor& t);  // a cudaStream_t
  void* stream_ = nullptr;
};

// One launch, on the device of `t` and its current stream.
template <class... Parameters, class... Args>
void launch_on_cuda(const Tensor& t, void (*launcher)(Parameters...), const Args&... args) {
  if (!launcher) raise_no_cuda();
  DeviceScope(t).launch(launcher, args...);
}

// body(begin, end) over parts of [0, n), of at least `grain`, on the CPU's threads.
template <class Body>
void in_parallel(int64_t n, int64_t grain, const Body& body) {
  if (n <= grain) return body(0, n);
  torch::stable::parallel_for(0, n, grain, body);
}

// ---- registration

// define(m) registers the schemas of a file's operators, implement(m) their implementation, the same for CPU
// and CUDA tensors: also in a build without CUDA, so that the operator can raise its error.
#define FASTLOSS_OPERATORS(define, implement)                             \
  STABLE_TORCH_LIBRARY_FRAGMENT(FASTLOSS_NAMESPACE, m) { define(m); }     \
  STABLE_TORCH_LIBRARY_IMPL(FASTLOSS_NAMESPACE, CPU, m) { implement(m); } \
  FASTLOSS_IMPLEMENT_CUDA(implement)
#if defined(FL_SIMT)
#define FASTLOSS_IMPLEMENT_CUDA(implement)
#else
#define FASTLOSS_IMPLEMENT_CUDA(implement) \
  STABLE_TORCH_LIBRARY_IMPL(FASTLOSS_NAMESPACE, CUDA, m) { implement(m); }
#endif
// For operators that exist for one of them.
#define FASTLOSS_CPU_OPERATORS(implement) \
  STABLE_TORCH_LIBRARY_IMPL(FASTLOSS_NAMESPACE, CPU, m) { implement(m); }
#if defined(FL_SIMT)
#define FASTLOSS_CUDA_OPERATORS(implement) FASTLOSS_CPU_OPERATORS(implement)
#else
#define FASTLOSS_CUDA_OPERATORS(implement) FASTLOSS_IMPLEMENT_CUDA(implement)
#endif

}  // namespace fastloss
