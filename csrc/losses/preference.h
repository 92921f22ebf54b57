// Preference losses of pairs of completions, from their log-probabilities or their rewards. The
// protocol is in drivers/elements.h. The type is an option at run time: these losses are small and their
// inputs few, so that a branch costs less than an instantiation for each.
#pragma once
#include "elementwise.h"

namespace fastloss::inline FL_ISA {

// -log sigmoid(u) and its derivative, mixed with those of -u by label smoothing.
template <class F>
struct PairLoss {
  F value, slope;
};
template <class F>
FL_FN PairLoss<F> smooth_pair(F u, scalar_t<F> smoothing) {
  const Logistic<F> s = logistic(u);
  const scalar_t<F> correct = 1 - smoothing;
  return {s.l + linear_part(u, fill<F>(correct), fill<F>(smoothing)), smoothing * s.p - correct * s.q};
}
template <class F>
FL_FN PairLoss<F> hinge_pair(F u) {
  const F margin = 1 - u;
  const auto met = margin <= 0;  // not so for NaN, which stays
  return {select(met, F{}, margin), select(met, F{}, F{} - 1)};
}

FL_ENUM(Dpo, sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down,
        discopop, sft)
FL_ENUM(Divergence, reverse_kl, forward_kl, js, alpha)

// Inputs: log-probabilities of the chosen and the rejected answer, then the same of the reference model. With
// the log-ratios c and r, each through the map of a divergence, and D = c - r.
template <class R, int>
struct DirectPreference {
  static constexpr int kInputs = 4, kVariants = 1;
  static constexpr unsigned kWrt = 0b1111;
  static constexpr bool kLogSum = false;
  FL_HPARAMS(type, beta, label_smoothing, divergence, alpha, tau, top);
  static constexpr Choice kChoices[] = {{H::type, names_of(Dpo{})}, {H::divergence, names_of(Divergence{})}};
  Dpo type;
  Divergence divergence;
  R beta, smoothing, alpha, tau, top;  // top: bound of a divergence's exponent

  static int variant(const double*) { return 0; }
  FL_FN explicit DirectPreference(const double* hparams)
      : type(static_cast<Dpo>(int(hparams[H::type]))),
        divergence(static_cast<Divergence>(int(hparams[H::divergence]))),
        beta(R(hparams[H::beta])),
        smoothing(R(hparams[H::label_smoothing])),
        alpha(R(hparams[H::alpha])),
        tau(R(hparams[H::tau])),
        top(R(hparams[H::top])) {}

  // What takes the place of a log-ratio, and its derivative.
  template <class F>
  FL_FN F ratio(F x, F& slope) const {
    switch (divergence) {
      case Divergence::reverse_kl:
        slope = F{} + 1;
        return x;
      case Divergence::js: {
        const Logistic<F> s = logistic(x);
        slope = s.q;
        return R(0.6931471805599453) - (s.l + max(-x, F{}));
      }
      case Divergence::forward_kl:
      case Divergence::alpha:
        break;
    }
    const R rate = divergence == Divergence::forward_kl ? R(-1) : alpha - 1;
    const F exponent = x * rate;
    const auto outside = exponent > top;
    const F bounded = select(outside, F{} + top, exponent);
    slope = select(outside, F{}, exp(bounded));
    return expm1(bounded) / rate;
  }

  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    if (type == Dpo::sft) {
      d[0] = F{} - 1;
      d[1] = d[2] = d[3] = F{};
      return -v[0];
    }
    F slope_c, slope_r;
    const F c = ratio(v[0] - v[2], slope_c), r = ratio(v[1] - v[3], slope_r), u = beta * (c - r);
    F value{}, by_c{}, by_r{}, by_u{};
    switch (type) {
      case Dpo::sigmoid: {
        const PairLoss<F> p = smooth_pair(u, smoothing);
        value = p.value, by_u = p.slope;
        break;
      }
      case Dpo::hinge: {
        const PairLoss<F> p = hinge_pair(u);
        value = p.value, by_u = p.slope;
        break;
      }
      case Dpo::ipo: {
        const F e = (c - r) - 1 / (2 * beta);
        value = e * e, by_c = 2 * e, by_r = -by_c;
        break;
      }
      case Dpo::exo_pair: {  // the divergence of (p, 1 - p) from (1 - e, e)
        const Logistic<F> s = logistic(u);
        const R log_correct = log1p(-smoothing), log_flipped = log(smoothing);
        value =
            weighed(s.p, -max(-u, F{}) - s.l - log_correct) + weighed(s.q, -max(u, F{}) - s.l - log_flipped);
        by_u = weighed(s.p * s.q, u - (log_correct - log_flipped));
        break;
      }
      case Dpo::nca_pair: {
        const Logistic<F> a = logistic(beta * c), b = logistic(beta * r);
        value = (a.l + max(-beta * c, F{})) + R(0.5) * (a.l + max(beta * c, F{})) +
                R(0.5) * (b.l + max(beta * r, F{}));
        by_c = beta * (R(0.5) * a.p - a.q), by_r = R(0.5) * beta * b.p;
        break;
      }
      case Dpo::robust: {
        const Logistic<F> s = logistic(u);
        const R correct = (1 - smoothing) / (1 - 2 * smoothing), flipped = smoothing / (1 - 2 * smoothing);
        value = (correct - flipped) * s.l + linear_part(u, fill<F>(correct), fill<F>(-flipped));
        by_u = -correct * s.q - flipped * s.p;
        break;
      }
      case Dpo::bco_pair: {
        const Logistic<F> a = logistic(beta * c), b = logistic(beta * r);
        value = (a.l + max(-beta * c, F{})) + (b.l + max(beta * r, F{}));
        by_c = -beta * a.q, by_r = beta * b.p;
        break;
      }
      case Dpo::sppo_hard: {
        const F win = c - R(0.5) / beta, lose = r + R(0.5) / beta;
        value = win * win + lose * lose, by_c = 2 * win, by_r = 2 * lose;
        break;
      }
      case Dpo::apo_zero: {
        const Logistic<F> a = logistic(beta * c), b = logistic(beta * r);
        value = a.q + b.p, by_c = -beta * (a.p * a.q), by_r = beta * (b.p * b.q);
        break;
      }
      case Dpo::apo_down: {
        const Logistic<F> a = logistic(beta * c), s = logistic(u);
        value = a.p + s.q, by_c = beta * (a.p * a.q), by_u = -(s.p * s.q);
        break;
      }
      case Dpo::discopop: {  // e^-u sigmoid(u / tau) as one exponential: neither factor overflows
        const Logistic<F> s = logistic(u), w = logistic(u / tau);
        const F size = abs(u), bend = (w.p * w.q) / tau;
        const F tail = exp(select(u >= 0, -u, u * (1 / tau - 1))) / (1 + exp(-size / tau));
        const F nll = s.l + max(-u, F{});
        value = nll * w.q + tail;
        by_u = -s.q * w.q - weighed(bend, nll) - tail + tail * w.q / tau;
        break;
      }
      case Dpo::sft:
        break;
    }
    d[0] = weighed(by_c + beta * by_u, slope_c);
    d[1] = weighed(by_r - beta * by_u, slope_r);
    d[2] = -d[0];
    d[3] = -d[1];
    return value;
  }
};

// KTO: w sigmoid(-s beta (log-ratio - z)), with s = 1 and its weight w where the answer is desirable, else
// s = -1 and the other weight. Inputs are log-probabilities, those of the reference model, 1 where the answer
// is desirable (else 0), and the reference point z.
template <class R, int>
struct Kto {
  static constexpr int kInputs = 4, kVariants = 1;
  static constexpr unsigned kWrt = 0b0011;
  static constexpr bool kLogSum = false;
  FL_HPARAMS(beta, desirable_weight, undesirable_weight);
  R beta, desirable, undesirable;

  static int variant(const double*) { return 0; }
  FL_FN explicit Kto(const double* hparams)
      : beta(R(hparams[H::beta])),
        desirable(R(hparams[H::desirable_weight])),
        undesirable(R(hparams[H::undesirable_weight])) {}

  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const auto good = v[2] > 0;
    const F w = select(good, F{} + desirable, F{} + undesirable);
    const F b = select(good, F{} + beta, F{} - beta);
    const Logistic<F> s = logistic(b * ((v[0] - v[1]) - v[3]));
    d[0] = -(w * b) * (s.p * s.q);
    d[1] = -d[0];
    return w * s.q;
  }
};

FL_ENUM(PairwiseType, sigmoid, hinge, ipo)

// Without a reference model: inputs are (mean) log-probabilities of chosen and rejected, and the chosen
// answer's negative log-likelihood. With alpha the log-probability l becomes (1 - e^(-alpha l)) / alpha.
template <class R, int>
struct ReferenceFree {
  static constexpr int kInputs = 3, kVariants = 1;
  static constexpr unsigned kWrt = 0b111;
  static constexpr bool kLogSum = false;
  FL_HPARAMS(type, beta, margin, label_smoothing, nll_weight, alpha);
  static constexpr Choice kChoices[] = {{H::type, names_of(PairwiseType{})}};
  PairwiseType type;
  R beta, margin, smoothing, nll, alpha;

  static int variant(const double*) { return 0; }
  FL_FN explicit ReferenceFree(const double* hparams)
      : type(static_cast<PairwiseType>(int(hparams[H::type]))),
        beta(R(hparams[H::beta])),
        margin(R(hparams[H::margin])),
        smoothing(R(hparams[H::label_smoothing])),
        nll(R(hparams[H::nll_weight])),
        alpha(R(hparams[H::alpha])) {}

  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    F c = v[0], r = v[1], slope_c = F{} + 1, slope_r = slope_c;
    if (alpha != 0) {
      slope_c = exp(-alpha * c), slope_r = exp(-alpha * r);
      c = -expm1(-alpha * c) / alpha, r = -expm1(-alpha * r) / alpha;
    }
    F value, slope;
    if (type == PairwiseType::ipo) {
      const F e = (c - r) - 1 / (2 * beta);
      value = e * e, slope = 2 * e;
    } else {
      const F u = beta * (c - r) - margin;
      const PairLoss<F> p = type == PairwiseType::hinge ? hinge_pair(u) : smooth_pair(u, smoothing);
      value = p.value, slope = beta * p.slope;
    }
    d[0] = weighed(slope, slope_c);
    d[1] = -weighed(slope, slope_r);
    d[2] = F{} + nll;
    return nll != 0 ? value + nll * v[2] : value;
  }
};

// ORPO: nll - beta log sigmoid(log odds of chosen - log odds of rejected), of mean log-probabilities c and
// r. With nll_from_logps = 1 there is no third input, and nll = -c. The derivatives sigmoid(-log odds) / (1
// - e^c) are quotients of e^(r - c), 1 - e^c and 1 - e^r, finite as c -> 0.
template <class R, int>
struct OddsRatio {
  static constexpr int kInputs = 3, kVariants = 1;
  static constexpr unsigned kWrt = 0b111;
  static constexpr bool kLogSum = false;
  FL_HPARAMS(beta, nll_from_logps);
  R beta, nll_from_logps;

  static int variant(const double*) { return 0; }
  FL_FN explicit OddsRatio(const double* hparams)
      : beta(R(hparams[H::beta])), nll_from_logps(R(hparams[H::nll_from_logps])) {}

  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F c = v[0], r = v[1], not_c = -expm1(c), not_r = -expm1(r);
    const F x = (c - log(not_c)) - (r - log(not_r));
    const Logistic<F> s = logistic(x);
    const F gap = exp_down(-abs(r - c));
    const auto above = r > c;  // in units of the larger of e^c and e^r
    const F of_c = select(above, gap, F{} + 1), of_r = select(above, F{} + 1, gap);
    const F sum = of_c * not_r + of_r * not_c;
    d[0] = -beta * (of_r / sum) - nll_from_logps;
    d[1] = beta * (of_r * (not_c / sum) / not_r);
    d[2] = F{} + (1 - nll_from_logps);
    const F value = beta * (s.l + max(-x, F{}));
    return nll_from_logps != 0 ? value - c : value + v[2];
  }
};

// Reward models: -log sigmoid(chosen - rejected - margin), smoothed, plus c (chosen + rejected)^2.
template <class R, int>
struct BradleyTerry {
  static constexpr int kInputs = 3, kVariants = 1;
  static constexpr unsigned kWrt = 0b111;
  static constexpr bool kLogSum = false;
  FL_HPARAMS(label_smoothing, center_coefficient);
  R smoothing, center;

  static int variant(const double*) { return 0; }
  FL_FN explicit BradleyTerry(const double* hparams)
      : smoothing(R(hparams[H::label_smoothing])), center(R(hparams[H::center_coefficient])) {}

  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const PairLoss<F> p = smooth_pair((v[0] - v[1]) - v[2], smoothing);
    d[0] = p.slope;
    d[1] = d[2] = -p.slope;
    if (center == 0) return p.value;
    const F sum = v[0] + v[1], pull = 2 * center * sum;
    d[0] += pull;
    d[1] += pull;
    return p.value + center * sum * sum;
  }
};

}  // namespace fastloss::inline FL_ISA

#define FASTLOSS_PREFERENCE_LOSSES(X) \
  X(dpo_loss, DirectPreference)       \
  X(kto_loss, Kto)                    \
  X(reference_free, ReferenceFree) X(orpo_loss, OddsRatio) X(bradley_terry_loss, BradleyTerry)
