// A description of this library for Python (fastloss/_ops/abi.py), as JSON, so that no name and no constant
// of C++ is repeated there.
//
//   operators   by the name of a loss: its hyperparameters in order, which of them are values of an enum, the
//               number of inputs, which of these are differentiable; of a row loss the numbers that it
//               saves for each row, and its outputs if there are several
//   enums       by name: their values in order
//   constants   sizes of what operators return, blocks on which sums depend
#include <string>
#include <string_view>
#include <vector>

#include "../cpu/kernels/linear.h"
#include "../losses/aggregation.h"
#include "../losses/distillation.h"
#include "../losses/reward_model.h"
#include "../losses/survival.h"
#include "runtime.h"

namespace fastloss {
namespace {

std::string in_quotes(std::string_view s) { return '"' + std::string(s) + '"'; }
std::string joined(const std::vector<std::string>& parts, char open, char close) {
  std::string s;
  for (const std::string& part : parts) s += (s.empty() ? "" : ", ") + part;
  return open + s + close;
}
std::string list(const std::vector<std::string>& parts) { return joined(parts, '[', ']'); }

std::vector<std::string> split(std::string_view names) {
  std::vector<std::string> parts;
  while (!names.empty()) {
    const size_t comma = std::min(names.find(','), names.size());
    parts.emplace_back(names.substr(0, comma));
    names.remove_prefix(std::min(names.size(), comma + 2));  // ", " between
  }
  return parts;
}
std::string list(std::string_view names) {
  std::vector<std::string> parts = split(names);
  for (std::string& part : parts) part = in_quotes(part);
  return list(parts);
}

struct Object {
  std::vector<std::string> fields;
  Object& set(std::string_view name, const std::string& json) {
    fields.push_back(in_quotes(name) + ": " + json);
    return *this;
  }
  Object& set(std::string_view name, int64_t number) { return set(name, std::to_string(number)); }
  std::string json() const { return joined(fields, '{', '}'); }
};

template <class Loss>
Object loss() {
  const std::vector<std::string> names = split(Loss::kHparams);
  Object choices;
  for (const Choice& c : choices_of<Loss>()) choices.set(names[c.hparam], list(c.names));
  return Object().set("hparams", list(Loss::kHparams)).set("choices", choices.json());
}
template <template <class, int> class Loss>
std::string row_loss() {
  return loss<Loss<float, 0>>()
      .set("saved", saved_numbers<Loss>())
      .set("outputs", Loss<float, 0>::kOutputs)
      .json();
}
template <template <class, int> class Loss>
std::string element_loss() {
  using L = Loss<float, 0>;
  std::vector<std::string> wrt;
  for (int i = 0; i < L::kInputs; ++i)
    if (L::kWrt >> i & 1) wrt.push_back(std::to_string(i));
  return loss<L>().set("inputs", L::kInputs).set("wrt", list(wrt)).json();
}
template <template <class> class Loss>
std::string scan() {
  return loss<Loss<float>>().json();
}

std::string operators() {
  Object all;
#define FASTLOSS_DESCRIBE(name, Loss) all.set(#name, row_loss<Loss>());
  FASTLOSS_ROW_KERNELS(FASTLOSS_DESCRIBE)
#undef FASTLOSS_DESCRIBE
#define FASTLOSS_DESCRIBE(name, Loss) all.set(#name, element_loss<Loss>());
  FASTLOSS_ELEMENT_LOSSES(FASTLOSS_DESCRIBE)
#undef FASTLOSS_DESCRIBE
#define FASTLOSS_DESCRIBE(name, Loss) all.set(#name, scan<Loss>());
  FASTLOSS_SCANS(FASTLOSS_DESCRIBE)
#undef FASTLOSS_DESCRIBE
  return all.json();
}

template <class... Enums>
std::string enums(const std::pair<const char*, Enums>&... each) {
  Object all;
  (all.set(each.first, list(names_of(each.second))), ...);
  return all.json();
}

int64_t survival_state(Survival kind, bool efron) {
  SurvivalArgs a{};
  a.kind = kind;
  a.efron = efron;
  return a.state_width();
}
int64_t ranking_state(Ranking kind, int64_t items) {
  RankingArgs a{};
  a.kind = kind;
  a.n = items;
  return a.state_width();
}

std::string describe() {
  std::vector<std::string> capabilities;
  for (const char* name : cpu::kCapabilities) capabilities.push_back(in_quotes(name));
  Object constants;
  constants.set("state_head", kStateHead)
      .set("divergence_state", kDivergenceState)
      .set("aggregate_state", kStateNumbers)
      .set("cox_state", survival_state(Survival::cox, false))
      .set("cox_efron_state", survival_state(Survival::cox, true))
      .set("dart_state", survival_state(Survival::dart, false))
      .set("bradley_terry_state", ranking_state(Ranking::bradley_terry, 0))
      .set("plackett_luce_state", ranking_state(Ranking::plackett_luce, 0))  // and one for each item
      .set("linear_rows", cpu::kRowBlock)
      .set("default_background", INT64_MIN);
  return Object()
      .set("cpu_capabilities", list(capabilities))
      .set("operators", operators())
      .set("enums", enums(std::pair("Reduction", Reduction{}), std::pair("Aggregate", Aggregate{}),
                          std::pair("Ranking", Ranking{}), std::pair("Survival", Survival{}),
                          std::pair("TilePass", TilePass{})))
      .set("constants", constants.json())
      .json();
}

}  // namespace
}  // namespace fastloss

extern "C" FASTLOSS_EXPORT const char* fastloss_describe() {
  static const std::string description = fastloss::describe();
  return description.c_str();
}
