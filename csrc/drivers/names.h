// Names that C++ and Python share: of the hyperparameters of a loss and of the values of an enum. They are
// written once, here in C++; ops/describe.cpp hands them on, and Python passes what it passes by name.
#pragma once
#include <span>

namespace fastloss {

// FL_ENUM(Name, a, b, ...): an enum, and names_of(Name{}), "a, b, ...".
#define FL_ENUM(Name, ...)               \
  enum class Name : int { __VA_ARGS__ }; \
  constexpr const char* names_of(Name) { return #__VA_ARGS__; }

// FL_HPARAMS(a, b, ...) in the struct of a loss: it is made from `const double* hparams`, in which a stands
// at hparams[H::a].
#define FL_HPARAMS(...)                              \
  struct H {                                         \
    enum : int { __VA_ARGS__ __VA_OPT__(, ) count }; \
  };                                                 \
  static constexpr const char* kHparams = #__VA_ARGS__

// A hyperparameter that is a value of an enum: kChoices of a loss is an array of them.
struct Choice {
  int hparam;
  const char* names;
};
template <class Loss>
constexpr std::span<const Choice> choices_of() {
  if constexpr (requires { Loss::kChoices; }) return Loss::kChoices;
  return {};
}

inline constexpr int kMaxHparams = 10;  // of one loss

constexpr int count_of(const char* names) {
  int count = *names ? 1 : 0;
  for (const char* c = names; *c; ++c) count += *c == ',';
  return count;
}

}  // namespace fastloss
