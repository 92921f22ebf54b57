// The choice among the CPU kernels of the instruction sets that were compiled.
#pragma once
#include <stdexcept>

#include "../math/visibility.h"

namespace fastloss::cpu {

// The values of FASTLOSS_CPU_CAPABILITY, each better than those before it.
inline constexpr const char* kCapabilities[] = {"sse2", "avx2", "avx512", "amx"};

// Chosen once: the best that this machine has, or less if FASTLOSS_CPU_CAPABILITY limits it. Throws if that
// has any other value. amx: whether matrix products may use the tile registers, in addition to avx512.
enum class Isa : int { sse2, avx2, avx512 };
Isa isa();
bool amx();

FASTLOSS_EXPORT const char* capability();
FASTLOSS_EXPORT const char* linear_capability();  // of matrix products: also "amx"

// A kernel, or a table of kernels, that is compiled once for each instruction set. Files compiled per
// instruction set must not call `best`: the linker would keep one of its copies for all.
template <class T>
struct PerIsa {
  const T *sse2 = nullptr, *avx2 = nullptr, *avx512 = nullptr;

  const T& best() const {
    const T* const all[] = {sse2, avx2, avx512};
    const T* const chosen = all[static_cast<int>(isa())];
    if (!chosen) throw std::logic_error("fastloss: the CPU kernels are not part of this build");
    return *chosen;
  }
};

// FASTLOSS_PER_ISA(T, name), in a header: declares the PerIsa `name`. FASTLOSS_OF_ISA(T, name) = ..., in the
// file that is compiled per instruction set: its entry for FL_ISA.
#if defined(FL_SIMT)  // the operators of this build know only the CUDA kernels
#define FASTLOSS_PER_ISA(T, name) inline constexpr PerIsa<T> name{};
#else
#define FASTLOSS_PER_ISA(T, name)                         \
  extern const T name##_sse2, name##_avx2, name##_avx512; \
  inline constexpr PerIsa<T> name{&name##_sse2, &name##_avx2, &name##_avx512};
#endif
#define FASTLOSS_JOIN_(a, b) a##b
#define FASTLOSS_JOIN(a, b) FASTLOSS_JOIN_(a, b)
#define FASTLOSS_OF_ISA(T, name) const T FASTLOSS_JOIN(name##_, FL_ISA)

}  // namespace fastloss::cpu
