// Policy and value heads: of tokens. The protocol is in drivers/elements.h; masks and reductions are weights.
#pragma once
#include "preference.h"

namespace fastloss::inline FL_ISA {

FL_ENUM(Policy, clip, cispo, sapo, gradient, dro, geometric, bounded_change, bounded_kl)
FL_ENUM(Kl, none, k1, k2, k3, absolute, k1_straight, k3_straight)

// Inputs: log-probabilities l, those of the policy that drew the tokens, advantages A, log-probabilities of
// the reference model, and entropies. With the ratio rho = exp(l - old):
//   clip      max(-A min(rho, two_sided), -A clip(rho, 1 - low, 1 + high)); for A < 0 at most -A dual
//   cispo     -A l clip(rho, 1 - low, 1 + high), the ratio held constant
//   sapo      -A 4 / t sigmoid(t (rho - 1)), t = high for A > 0, else low
//   gradient  -A l
//   dro       -A l + low / 2 (l - old)^2
//   geometric -A, where A holds the answer's ratio; its gradient -A unless l - old is past -low or high
//   bounded   -A l min(rho, two_sided), the ratio held constant, where the token's own probability has not
//             gone the way of A too far: by a change of low or high, or by the divergence of two outcomes
// plus kl times an estimate of the divergence from the reference model, minus entropy times the entropies.
template <class R, int>
struct PolicyGradient {
  static constexpr int kInputs = 5, kVariants = 1;
  static constexpr unsigned kWrt = 0b10001;
  static constexpr bool kLogSum = false;
  FL_HPARAMS(type, low, high, dual, two_sided, kl_coef, kl_type, top, entropy_coef);
  static constexpr Choice kChoices[] = {{H::type, names_of(Policy{})}, {H::kl_type, names_of(Kl{})}};
  Policy type;
  Kl kl_type;
  R low, high, dual, two_sided, kl, top, entropy;  // top: bound of the ratio's exponent, both ways

  static int variant(const double*) { return 0; }
  FL_FN explicit PolicyGradient(const double* hparams)
      : type(static_cast<Policy>(int(hparams[H::type]))),
        kl_type(static_cast<Kl>(int(hparams[H::kl_type]))),
        low(R(hparams[H::low])),
        high(R(hparams[H::high])),
        dual(R(hparams[H::dual])),
        two_sided(R(hparams[H::two_sided])),
        kl(R(hparams[H::kl_coef])),
        top(R(hparams[H::top])),
        entropy(R(hparams[H::entropy_coef])) {}

  // Whether the probability of a token has moved too far, the way of A, from what it was drawn with.
  template <class F>
  FL_FN auto beyond(F l, F old, F a) const {
    const F change = exp(l) - exp(old);
    if (type == Policy::bounded_change) return ((a > 0) & (change > high)) | ((a <= 0) & (change < -low));
    const F other = -expm1(l), was = -expm1(old);  // of all other tokens
    const F kl_of_two = exp(old) * (old - l) + select(was > 0, was * (log(was) - log(other)), F{});
    return ((a > 0) & (kl_of_two > high) & (l > old)) | ((a <= 0) & (kl_of_two > low) & (l < old));
  }

  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F l = v[0], a = v[2], zero{}, raw = l - v[1];
    const F x = min(zero + top, max(zero - top, raw));
    const F rho = exp(x), slope = select((raw < -top) | (raw > top), zero, rho);  // of rho by l
    F value{}, by_l{};
    switch (type) {
      case Policy::clip: {
        const F free = -a * min(zero + two_sided, rho),
                bound = -a * min(zero + (1 + high), max(zero + (1 - low), rho));
        const auto stays = (free < bound) | (rho > two_sided);
        const F ceiling = -a * dual;
        const auto dual_holds = (a < 0) & (max(free, bound) > ceiling);
        value = select(dual_holds, ceiling, max(free, bound));
        by_l = select(stays, zero, -a * slope);
        by_l = select(dual_holds, zero, by_l);
        break;
      }
      case Policy::cispo:
        by_l = -a * min(zero + (1 + high), max(zero + (1 - low), rho));
        value = by_l * l;
        break;
      case Policy::sapo: {
        const F t = select(a > 0, zero + high, zero + low);
        const Logistic<F> s = logistic(t * (rho - 1));
        value = -a * (4 / t) * s.p;
        by_l = -4 * a * (s.p * s.q) * slope;
        break;
      }
      case Policy::gradient:
        by_l = -a;
        value = by_l * l;
        break;
      case Policy::geometric:
        value = -a;
        by_l = select(((a > 0) & (raw > high)) | ((a <= 0) & (raw < -low)), zero, value);
        break;
      case Policy::bounded_change:
      case Policy::bounded_kl:
        by_l = select(beyond(l, v[1], a), zero, -a * min(zero + two_sided, rho));
        value = by_l * l;
        break;
      case Policy::dro:
        by_l = low * raw - a;
        value = R(0.5) * low * (raw * raw) - a * l;
    }
    if (kl_type != Kl::none) {
      const F y = v[3] - l, square = R(0.5) * (y * y);
      F k{}, by{};
      switch (kl_type) {
        case Kl::k1:
        case Kl::k1_straight:
          k = -y, by = kl_type == Kl::k1 ? zero + 1 : -y;
          break;
        case Kl::k2:
          k = square, by = -y;
          break;
        case Kl::absolute:
          k = abs(y), by = select(y > 0, zero - 1, select(y < 0, zero + 1, zero));
          break;
        case Kl::k3:
        case Kl::k3_straight: {
          const F e = expm1(y);
          k = e - y, by = kl_type == Kl::k3 ? -e : -y;
          break;
        }
        case Kl::none:
          break;
      }
      value += kl * k;
      by_l += kl * by;
    }
    d[0] = by_l;
    d[4] = zero - entropy;
    return entropy != 0 ? value - entropy * v[4] : value;
  }
};

// max((v - R)^2, (clip(v, old - range, old + range) - R)^2) / 2 of values v, returns R and old values.
template <class R, int>
struct ClippedValue {
  static constexpr int kInputs = 3, kVariants = 1;
  static constexpr unsigned kWrt = 0b001;
  static constexpr bool kLogSum = false;
  FL_HPARAMS(clip_range);
  R range;

  static int variant(const double*) { return 0; }
  FL_FN explicit ClippedValue(const double* hparams) : range(R(hparams[H::clip_range])) {}

  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F free = v[0] - v[1], bound = min(v[2] + range, max(v[2] - range, v[0])) - v[1];
    const auto stays = free * free < bound * bound;
    const F e = select(stays, bound, free);
    d[0] = select(stays, F{}, e);
    return R(0.5) * (e * e);
  }
};

}  // namespace fastloss::inline FL_ISA

#define FASTLOSS_POLICY_LOSSES(X) X(policy_loss, PolicyGradient) X(value_loss, ClippedValue)
