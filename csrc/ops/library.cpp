#include "library.h"

#if defined(FASTLOSS_CUDA)
#include <dlfcn.h>
#endif

#include <vector>

#include "../cpu/pool.h"

namespace fastloss {

#if defined(FASTLOSS_CUDA)
// The handle of a stream is not in the stable ABI of torch 2.11, and libtorch_cuda is not in the global
// scope: the accessor is looked up where the library is already loaded.
void* current_stream(const Tensor& t) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "fastloss: this torch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return stream;
}
#else
void* current_stream(const Tensor&) { return nullptr; }
#endif

namespace {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

struct Contiguous {
  std::vector<int64_t> strides;
  int64_t count = 1;
  explicit Contiguous(Sizes sizes) : strides(sizes.size()) {
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = count;
      count *= sizes[d];
    }
  }
};

// Without the dispatcher between, which costs more than a small loss.
Tensor empty_strided(const Tensor& like, Sizes sizes, Sizes strides, ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type, device_type, like.get_device_index(),
                                                  &made));
  return Tensor(made);
}

}  // namespace

Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  return empty_strided(like, sizes, Contiguous(sizes).strides, dtype);
}

Tensor empty_like_pooled(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::empty_like(t);
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (!t.is_cpu() || bytes < cpu::kPoolMinimum)
    return empty_strided(t, t.sizes(), t.strides(), t.scalar_type());
  return torch::stable::from_blob(cpu::pool_acquire(bytes), t.sizes(), t.strides(), t.device(),
                                  t.scalar_type(), &cpu::pool_release);
}

Tensor empty_pooled(const Tensor& like, Sizes sizes, ScalarType dtype) {
  const Contiguous strides(sizes);
  const size_t bytes = static_cast<size_t>(strides.count) * (dtype == ScalarType::Double  ? 8
                                                             : dtype == ScalarType::Float ? 4
                                                                                          : 2);
  if (!like.is_cpu() || bytes < cpu::kPoolMinimum) return empty_strided(like, sizes, strides.strides, dtype);
  return torch::stable::from_blob(cpu::pool_acquire(bytes), sizes, strides.strides, like.device(), dtype,
                                  &cpu::pool_release);
}

}  // namespace fastloss
