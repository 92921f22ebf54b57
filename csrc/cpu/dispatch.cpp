#include "dispatch.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

namespace fastloss::cpu {
namespace {

constexpr int kAmx = std::size(kCapabilities) - 1;

// The best of kCapabilities that may be used; FASTLOSS_CPU_CAPABILITY names it in any case.
int allowed() {
  const char* const variable = std::getenv("FASTLOSS_CPU_CAPABILITY");
  const std::string given = variable ? variable : "";
  if (given.empty()) return kAmx;
  std::string requested = given;
  for (char& c : requested)
    if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
  std::string all;
  for (int i = 0; i <= kAmx; ++i) {
    if (requested == kCapabilities[i]) return i;
    all += (i ? ", " : "") + std::string(kCapabilities[i]);
  }
  throw std::runtime_error("FASTLOSS_CPU_CAPABILITY: expected one of " + all + ", got '" + given + "'");
}

int available() {
  // what x86-64-v3 and v4 promise beyond the baseline
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? 2 : v3 ? 1 : 0;
}

// Tiles are part of a thread's state that Linux keeps for a process once it has asked for it.
bool tiles_available() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22, kVectorBf16 = 1u << 5;
  if ((d & kTile) == 0 || (d & kBf16) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kVectorBf16) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

Isa isa() {
  static const Isa chosen = static_cast<Isa>(std::min(allowed(), available()));
  return chosen;
}
bool amx() {
  static const bool chosen = isa() == Isa::avx512 && allowed() == kAmx && tiles_available();
  return chosen;
}
const char* capability() { return kCapabilities[static_cast<int>(isa())]; }
const char* linear_capability() { return amx() ? kCapabilities[kAmx] : capability(); }

}  // namespace fastloss::cpu
