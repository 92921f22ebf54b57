// Pointwise losses: of a prediction and a target, element by element. The protocol is in core/elements.h.
#pragma once
#include "../core/elements.h"

namespace fastloss::inline FL_ISA {

// The sigmoid of x, 1 - sigmoid and log(1 + e^-|x|), all to full relative precision.
template <class F>
struct Logistic {
  F p, q, l;
};
template <class F>
FL_FN Logistic<F> logistic(F x) {
  const F e = exp(-abs(x)), big = 1 / (1 + e), small = e * big;
  const auto positive = x >= 0;
  return {select(positive, big, small), select(positive, small, big), log1p_unit(e)};
}

// a (1 - p_t)^gamma ce, where ce is the binary cross-entropy of logit x and target y in [0, 1], p_t = p y +
// (1 - p)(1 - y) and a = alpha y + (1 - alpha)(1 - y), or 1 if alpha < 0.
template <class R, int kPower>
struct SigmoidFocal {
  static constexpr int kInputs = 2, kVariants = 5;
  static constexpr unsigned kWrt = 0b11;
  static constexpr bool kLogSum = false;
  R of_one, of_zero, gamma;

  static int variant(const double* options) {
    const double special[] = {0, 0.5, 1, 2};
    for (int i = 0; i < 4; ++i)
      if (options[1] == special[i]) return i;
    return 4;
  }
  FL_FN explicit SigmoidFocal(const double* options)
      : of_one(options[0] < 0 ? R(1) : R(options[0])),
        of_zero(options[0] < 0 ? R(1) : R(1 - options[0])),
        gamma(R(options[1])) {}

  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F x = v[0], y = v[1], no = 1 - y;
    const Logistic<F> s = logistic(x);
    const F ce = s.l + (y * max(-x, F{}) + no * max(x, F{}));
    const F m = s.p * no + s.q * y;  // 1 - p_t
    F power, slope;                  // m^gamma, and ce times its derivative by m
    if constexpr (kPower == 0) {
      power = F{} + 1;
      slope = F{};
    } else if constexpr (kPower == 2) {
      power = m;
      slope = ce;
    } else if constexpr (kPower == 3) {
      power = m * m;
      slope = 2 * m * ce;
    } else {  // as m -> 0, ce / m -> 1 where m^(gamma - 1) may not be finite
      power = kPower == 1 ? sqrt(m) : exp(gamma * log(m));
      slope = select(m > 0, gamma * power * (ce / m), F{});
    }
    const F a = of_one * y + of_zero * no;
    d[0] = a * (power * (s.p * no - s.q * y) + slope * (s.p * s.q) * (no - y));
    d[1] = (of_one - of_zero) * (power * ce) + a * (slope * (s.q - s.p) - power * x);
    return a * (power * ce);
  }
};

}  // namespace fastloss::inline FL_ISA

// The pointwise losses: name of the operator and struct.
#define FASTLOSS_POINTWISE_LOSSES(X) X(sigmoid_focal_loss, SigmoidFocal)
