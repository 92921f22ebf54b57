#include "attributes.h"

#include "cuda_or_shim.cuh"

#if !defined(FL_SIMT)
#include <cxxabi.h>

#include <cstdlib>
#endif

namespace fastloss::cuda {
namespace {

std::vector<const void*>& kernels() {
  static std::vector<const void*> all;
  return all;
}

}  // namespace

bool register_kernel(const void* kernel) {
  kernels().push_back(kernel);
  return true;
}

std::vector<KernelAttributes> kernel_attributes() {
  std::vector<KernelAttributes> result;
#if !defined(FL_SIMT)
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    (void)cudaGetLastError();
    return result;
  }
  for (const void* kernel : kernels()) {
    cudaFuncAttributes attributes;
    const char* mangled = nullptr;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess ||
        cudaFuncGetName(&mangled, kernel) != cudaSuccess) {
      (void)cudaGetLastError();
      continue;
    }
    char* name = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
    result.push_back(
        {name ? name : mangled, attributes.numRegs, attributes.sharedSizeBytes, attributes.localSizeBytes});
    std::free(name);
  }
#endif
  return result;
}

}  // namespace fastloss::cuda
