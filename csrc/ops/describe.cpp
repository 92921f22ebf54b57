// What Python has to know of this library, as JSON: no name and no number of C++ is written a second time
// there (fastloss/_ops/abi.py reads it).
#include <string>

#include "../cpu/dispatch.h"
#include "../math/visibility.h"

namespace fastloss {
namespace {

std::string quoted(const std::string& s) { return '"' + s + '"'; }

template <class Names>
std::string list(const Names& names) {
  std::string s;
  for (const auto& name : names) s += (s.empty() ? "" : ", ") + quoted(name);
  return '[' + s + ']';
}

std::string describe() { return "{" + quoted("cpu_capabilities") + ": " + list(cpu::kCapabilities) + "}"; }

}  // namespace
}  // namespace fastloss

extern "C" FASTLOSS_EXPORT const char* fastloss_describe() {
  static const std::string description = fastloss::describe();
  return description.c_str();
}
