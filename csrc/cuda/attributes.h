// What the compiler made of each kernel, as the driver tells it on a machine with a GPU.
#pragma once
#include <string>
#include <vector>

#include "../math/visibility.h"

namespace fastloss::cuda {

struct KernelAttributes {
  std::string name;
  int registers;
  size_t shared_bytes, local_bytes;  // local memory: stack and spills
};

// Every registered kernel; empty where no GPU is present.
FASTLOSS_EXPORT std::vector<KernelAttributes> kernel_attributes();

// Called while the library is loaded, through Registered below.
bool register_kernel(const void* kernel);

// Mentioning Registered<&kernel<...>>::done where a kernel is launched lists that instantiation.
template <auto kKernel>
struct Registered {
  static inline const bool done = register_kernel(reinterpret_cast<const void*>(kKernel));
};

}  // namespace fastloss::cuda
