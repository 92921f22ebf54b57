#include "dispatch.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "kernels/aggregation.h"
#include "kernels/ctc.h"
#include "kernels/distillation.h"
#include "kernels/feature_sums.h"
#include "kernels/linear.h"
#include "kernels/similarity.h"
#include "kernels/survival.h"
#include "kernels/triplets.h"

namespace fastloss::cpu {
namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;
  const ScanKernels* scans;
  const ElementKernels* elements;
  const RankingKernel* ranking;
};

Choice choose() {
  const char* asked = std::getenv("FASTLOSS_CPU_CAPABILITY");
  const auto allowed = [&](const char* name) { return !asked || std::strcmp(asked, name) == 0; };
  // what x86-64-v4 and v3 promise beyond the baseline
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && (allowed("avx512") || allowed("amx")))
    return {"avx512", &kernels_avx512, &scans_avx512, &elements_avx512, &ranking_avx512};
  if (v3 && (allowed("avx2") || (asked && std::strcmp(asked, "avx512") == 0)))
    return {"avx2", &kernels_avx2, &scans_avx2, &elements_avx2, &ranking_avx2};
  return {"sse2", &kernels_sse2, &scans_sse2, &elements_sse2, &ranking_sse2};
}

const Choice& choice() {
  static const Choice c = choose();
  return c;
}

// Tiles are part of a thread's state that Linux keeps for a process once it has asked for it.
bool tiles_allowed() {
  static const bool allowed = [] {
    const char* asked = std::getenv("FASTLOSS_CPU_CAPABILITY");
    if (asked && std::strcmp(asked, "amx") != 0) return false;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22, kVectorBf16 = 1u << 5;
    if ((d & kTile) == 0 || (d & kBf16) == 0) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kVectorBf16) == 0) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
}

}  // namespace

const Kernels& kernels() { return *choice().kernels; }
const ScanKernels& scan_kernels() { return *choice().scans; }
const ElementKernels& element_kernels() { return *choice().elements; }
RankingKernel ranking_kernel() { return *choice().ranking; }
const char* capability() { return choice().name; }
const LinearKernels& linear_kernels() {
  const Kernels* chosen = choice().kernels;
  if (chosen == &kernels_avx512) return tiles_allowed() ? linear_amx : linear_avx512;
  return chosen == &kernels_avx2 ? linear_avx2 : linear_sse2;
}
const char* linear_capability() { return &linear_kernels() == &linear_amx ? "amx" : capability(); }
const AggregateKernels& aggregate_kernels() {
  const Kernels* chosen = choice().kernels;
  if (chosen == &kernels_avx512) return aggregates_avx512;
  return chosen == &kernels_avx2 ? aggregates_avx2 : aggregates_sse2;
}
FeatureKernel feature_kernel() {
  const Kernels* chosen = choice().kernels;
  return chosen == &kernels_avx512 ? features_avx512
         : chosen == &kernels_avx2 ? features_avx2
                                   : features_sse2;
}
AlignmentKernel alignment_kernel() {
  const Kernels* chosen = choice().kernels;
  return chosen == &kernels_avx512 ? alignment_avx512
         : chosen == &kernels_avx2 ? alignment_avx2
                                   : alignment_sse2;
}
SurvivalKernel survival_kernel() {
  const Kernels* chosen = choice().kernels;
  return chosen == &kernels_avx512 ? survival_avx512
         : chosen == &kernels_avx2 ? survival_avx2
                                   : survival_sse2;
}
const TileKernels& tile_kernels() {
  const Kernels* chosen = choice().kernels;
  return chosen == &kernels_avx512 ? tiles_avx512 : chosen == &kernels_avx2 ? tiles_avx2 : tiles_sse2;
}
const TripletKernels& triplet_kernels() {
  const Kernels* chosen = choice().kernels;
  return chosen == &kernels_avx512 ? triplets_avx512
         : chosen == &kernels_avx2 ? triplets_avx2
                                   : triplets_sse2;
}
DivergenceKernel divergence_kernel() {
  const Kernels* chosen = choice().kernels;
  if (chosen == &kernels_avx512) return divergence_avx512;
  return chosen == &kernels_avx2 ? divergence_avx2 : divergence_sse2;
}

}  // namespace fastloss::cpu
