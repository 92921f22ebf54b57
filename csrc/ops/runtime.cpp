#include "runtime.h"

#if defined(FASTLOSS_CUDA)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <stdexcept>

#include "../cpu/pool.h"

namespace fastloss {
namespace {

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

size_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      FL_CHECK(false, "empty: unknown size of an element");
      return 0;
  }
}

// Without the dispatcher, which costs more than a small loss.
Tensor empty_strided(const Tensor& like, Sizes sizes, Sizes strides, ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type,
                               device_type, like.get_device_index(), &made);
  FL_CHECK(error == TORCH_SUCCESS, "no memory for a tensor of ", Contiguous(sizes).count, " elements");
  return Tensor(made);
}

// From the pool if it is large.
Tensor pooled(const Tensor& like, Sizes sizes, Sizes strides, int64_t count, ScalarType dtype) {
  if (!like.is_cpu()) return empty_strided(like, sizes, strides, dtype);
  const size_t bytes = static_cast<size_t>(count) * element_size(dtype);
  if (bytes < cpu::kPoolMinimum) return empty_strided(like, sizes, strides, dtype);
  if (!cpu::pool_enabled()) {
    const Tensor fresh = empty_strided(like, sizes, strides, dtype);
    cpu::prefer_huge_pages(fresh.mutable_data_ptr(), bytes);
    return fresh;
  }
  return torch::stable::from_blob(cpu::pool_acquire(bytes), sizes, strides, like.device(), dtype,
                                  &cpu::pool_release);
}

// Without gaps and overlaps, in any order of the dimensions.
bool is_dense(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<size_t> dims;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.push_back(d);
  std::sort(dims.begin(), dims.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t count = 1;
  for (const size_t d : dims) {
    if (strides[d] != count) return false;
    count *= sizes[d];
  }
  return true;
}

}  // namespace

Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  return empty_strided(like, sizes, Contiguous(sizes).strides, dtype);
}

Tensor empty_pooled(const Tensor& like, Sizes sizes, ScalarType dtype) {
  const Contiguous dense(sizes);
  return pooled(like, sizes, dense.strides, dense.count, dtype);
}

Tensor empty_like_pooled(const Tensor& t) {
  if (!t.is_contiguous() && !is_dense(t)) return torch::stable::empty_like(t);
  return pooled(t, t.sizes(), t.strides(), t.numel(), t.scalar_type());
}

void raise_no_cuda() {
  throw std::runtime_error(
      "fastloss was built without CUDA kernels: install nvcc and rebuild with FASTLOSS_CUDA=1 pip install "
      "--no-build-isolation --force-reinstall --no-deps .");
}

#if defined(FASTLOSS_CUDA)
// The handle of a stream is not in the stable ABI of torch 2.11, and libtorch_cuda is not in the global
// scope: the accessor is looked up where the library is already loaded.
void* DeviceScope::current_stream(const Tensor& t) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  FL_CHECK(get, "fastloss: this torch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return stream;
}
#else
void* DeviceScope::current_stream(const Tensor&) { return nullptr; }
#endif

}  // namespace fastloss
