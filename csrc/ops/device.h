// Where an operator's kernel runs, and tensors as a kernel can take them.
#pragma once
#include <optional>
#include <stdexcept>

#include "library.h"
#if defined(FASTLOSS_CUDA) || defined(FL_SIMT)
#define FASTLOSS_HAS_CUDA 1
#include "../cuda/launchers.h"
#endif

namespace fastloss {
namespace {

#if defined(FL_SIMT)
[[maybe_unused]] bool runs_on_cuda(const Tensor&) { return true; }  // the CUDA kernels, executed on the CPU
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};
#else
[[maybe_unused]] bool runs_on_cuda(const Tensor& t) { return !t.is_cpu(); }
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {}
};
#endif

// Calls `launcher(args, stream)` on the tensor's device and its current stream.
#if defined(FASTLOSS_HAS_CUDA)
#define FASTLOSS_CUDA_KERNEL(name) &cuda::name
template <class Args>
void launch_on(const Tensor& t, void (*launcher)(const Args&, void*), const Args& args) {
  const OnDevice scope(t);
  launcher(args, current_stream(t));
}
#else
#define FASTLOSS_CUDA_KERNEL(name) nullptr
template <class Args>
[[noreturn]] void launch_on(const Tensor&, void (*)(const Args&, void*), const Args&) {
  throw std::runtime_error(
      "fastloss was built without CUDA kernels: install nvcc and rebuild with FASTLOSS_CUDA=1 pip install "
      "--no-build-isolation --force-reinstall --no-deps .");
}
#endif

[[maybe_unused]] Tensor contiguous_as(const Tensor& t, ScalarType type) {
  const Tensor typed = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

}  // namespace
}  // namespace fastloss
