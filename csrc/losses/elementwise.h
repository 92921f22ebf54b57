// Pointwise losses: of a prediction and a target, element by element. The protocol is in drivers/elements.h.
#pragma once
#include "../drivers/elements.h"
#include "../math/math.h"

namespace fastloss::inline FL_ISA {

// The sigmoid of x, 1 - sigmoid and log(1 + e^-|x|), all to full relative precision.
template <class F>
struct Logistic {
  F p, q, l;
};
template <class F>
FL_FN Logistic<F> logistic(F x, F e, F l) {  // with e = e^-|x| at hand
  const F big = sigmoid_of_exp(e), small = e * big;
  const auto positive = x >= 0;
  return {select(positive, big, small), select(positive, small, big), l};
}
template <class F>
FL_FN Logistic<F> logistic(F x) {
  const F e = exp_down(-abs(x));
  return logistic(x, e, log1p_unit(e));
}
// w x; where w is 0 also of an infinite x, whose limit it is. A NaN in x has to show elsewhere.
template <class F>
FL_FN F weighed(F w, F x) {
  return select(w == 0, F{}, w * x);
}
// The steps of a loss whose first input is a logit.
struct OfLogit {
  static constexpr int kSteps = 2;
  template <int kStep, class F>
  FL_FN F step(const F* v, const F* t) const {
    if constexpr (kStep == 0) return exp_down(-abs(v[0]));
    return log1p_unit(t[0]);
  }
};

// The binary cross-entropy of logit x with the weights `yes` and `no` of the classes, without log(1 + e^-|x|).
template <class F>
FL_FN F linear_part(F x, F yes, F no) {
  return weighed(select(x >= 0, no, yes), abs(x));
}

// a (1 - p_t)^gamma ce, where ce is the binary cross-entropy of logit x and target y in [0, 1], p_t = p y +
// (1 - p)(1 - y) and a = alpha y + (1 - alpha)(1 - y), or 1 if alpha < 0.
template <class R, int kPower>
struct SigmoidFocal : OfLogit {
  static constexpr int kInputs = 2, kVariants = 5;
  static constexpr unsigned kWrt = 0b11;
  static constexpr bool kLogSum = false;
  FL_HPARAMS(alpha, gamma);
  R of_one, of_zero, gamma;

  static int variant(const double* hparams) {
    const double special[] = {0, 0.5, 1, 2};
    for (int i = 0; i < 4; ++i)
      if (hparams[H::gamma] == special[i]) return i;
    return 4;
  }
  FL_FN explicit SigmoidFocal(const double* hparams)
      : of_one(hparams[H::alpha] < 0 ? R(1) : R(hparams[H::alpha])),
        of_zero(hparams[H::alpha] < 0 ? R(1) : R(1 - hparams[H::alpha])),
        gamma(R(hparams[H::gamma])) {}

  template <class F>
  FL_FN F operator()(const F* v, const F* t, F* d) const {
    const F x = v[0], y = v[1], no = 1 - y;
    const Logistic<F> s = logistic(x, t[0], t[1]);
    const F ce = s.l + linear_part(x, y, no);
    const F m = s.p * no + s.q * y;    // 1 - p_t
    const F bend = s.p * s.q;          // the derivative of p
    const F bent = weighed(bend, ce);  // 0 at infinity
    F power, slope, by_m;  // m^gamma, and its derivative by m: times ce, and times ce and that of p
    if constexpr (kPower == 0) {
      power = F{} + 1;
      slope = by_m = F{};
    } else if constexpr (kPower == 2) {
      power = m;
      slope = ce;
      by_m = bent;
    } else if constexpr (kPower == 3) {
      power = m * m;
      slope = 2 * m * ce;
      by_m = 2 * m * bent;
    } else {  // as m -> 0, ce / m -> 1 where m^(gamma - 1) may not be finite
      power = kPower == 1 ? sqrt(m) : exp(gamma * log(m));
      slope = select(m > 0, gamma * power * (ce / m), F{});
      by_m = weighed(bend, slope);
    }
    const F a = of_one * y + of_zero * no;
    d[0] = a * (power * (s.p * no - s.q * y) + by_m * (no - y));
    d[1] = a * (slope * (s.q - s.p) - weighed(power, x));
    if (of_one != of_zero) d[1] += (of_one - of_zero) * (power * ce);
    return a * (power * ce);
  }
};

// ---- regression: e = prediction - target

template <class F>
FL_FN F sign(F e) {  // of 0 and NaN: itself
  return select(e > 0, F{} + 1, select(e < 0, F{} - 1, e));
}
struct Regression {
  static constexpr int kInputs = 2, kVariants = 1;
  static constexpr unsigned kWrt = 0b11;
  static constexpr bool kLogSum = false;
  FL_HPARAMS();
  static int variant(const double*) { return 0; }
};

template <class R, int>
struct SquaredError : Regression {
  static constexpr bool kHalfDerivatives = true;
  FL_FN explicit SquaredError(const double*) {}
  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F e = v[0] - v[1];
    d[0] = e;
    d[1] = -e;
    return e * e;
  }
};

template <class R, int>
struct AbsoluteError : Regression {
  FL_FN explicit AbsoluteError(const double*) {}
  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F e = v[0] - v[1];
    d[0] = sign(e);
    d[1] = -d[0];
    return abs(e);
  }
};

// e^2 / (2 beta) below beta, |e| - beta / 2 above.
template <class R, int>
struct SmoothAbsoluteError : Regression {
  FL_HPARAMS(beta);
  R beta;
  FL_FN explicit SmoothAbsoluteError(const double* hparams) : beta(R(hparams[H::beta])) {}
  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F e = v[0] - v[1], size = abs(e), slope = e / beta;
    const auto near = size < beta;
    d[0] = select(near, slope, sign(e));
    d[1] = -d[0];
    return select(near, R(0.5) * e * slope, size - R(0.5) * beta);
  }
};

// e^2 / 2 up to delta, delta (|e| - delta / 2) above.
template <class R, int>
struct Huber : Regression {
  FL_HPARAMS(delta);
  R delta;
  FL_FN explicit Huber(const double* hparams) : delta(R(hparams[H::delta])) {}
  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F e = v[0] - v[1], size = abs(e);
    const auto near = size <= delta;
    d[0] = select(near, e, delta * sign(e));
    d[1] = -d[0];
    return select(near, R(0.5) * e * e, delta * (size - R(0.5) * delta));
  }
};

// log cosh e = |e| - log 2 + log(1 + u^2), u = e^-|e|; near 0, where the first two terms cancel,
// log(1 + (1 - u)^2 / (2 u)). Its derivative tanh e = (1 - u) (1 + u) / (1 + u^2), from u - 1 to full precision.
template <class R, int>
struct LogCosh : Regression {
  static constexpr bool kLogSum = true;
  static constexpr int kSteps = 1;
  FL_FN explicit LogCosh(const double*) {}
  template <int, class F>
  FL_FN F step(const F* v, const F*) const {
    return expm1(-abs(v[0] - v[1]));
  }
  template <class F>
  FL_FN F operator()(const F* v, const F* t, F* d, F& more) const {
    const F e = v[0] - v[1], size = abs(e), down = t[0], u = 1 + down, square = alone(u, u);
    d[0] = copysign(-down * (2 + down) / (1 + square), e);
    d[1] = -d[0];
    const auto near = size < 1;
    more = select(near, down * down / (u + u), square);
    return select(near, F{}, size - R(0.6931471805599453));
  }
};

// ---- two classes

// -y log p - (1 - y) log(1 - p) of a probability p; logarithms are not below -100.
template <class R, int>
struct BinaryCrossEntropy : Regression {
  FL_FN explicit BinaryCrossEntropy(const double*) {}
  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F p = v[0], y = v[1], lowest = F{} - 100;
    F of_one = log(p), of_zero = log1p(-p);
    of_one = select(of_one < -100, lowest, of_one);
    of_zero = select(of_zero < -100, lowest, of_zero);
    d[0] = (p - y) / max((1 - p) * p, F{} + R(1e-12));
    d[1] = of_zero - of_one;
    return (y - 1) * of_zero - y * of_one;
  }
};

// The same of a logit x.
template <class R, int>
struct BinaryCrossEntropyWithLogits : Regression, OfLogit {
  static constexpr int kSteps = 1;
  static constexpr bool kLogSum = true;
  FL_FN explicit BinaryCrossEntropyWithLogits(const double*) {}
  template <class F>
  FL_FN F operator()(const F* v, const F* t, F* d, F& u) const {
    const F x = v[0], y = v[1], no = 1 - y;
    u = t[0];
    const F big = sigmoid_of_exp(u), small = u * big;
    d[0] = no * select(x >= 0, big, small) - y * select(x >= 0, small, big);
    d[1] = -x;
    return linear_part(x, y, no);
  }
};

// With the positive class weighted: its share y is y w, w the third input.
template <class R, int>
struct WeightedBinaryCrossEntropyWithLogits : Regression, OfLogit {
  static constexpr int kInputs = 3;
  FL_FN explicit WeightedBinaryCrossEntropyWithLogits(const double*) {}
  template <class F>
  FL_FN F operator()(const F* v, const F* t, F* d) const {
    const F x = v[0], w = v[2], yes = v[1] * w, no = 1 - v[1];
    const Logistic<F> s = logistic(x, t[0], t[1]);
    d[0] = no * s.p - yes * s.q;
    d[1] = linear_part(x, w, F{} - 1) + (w - 1) * s.l;
    return linear_part(x, yes, no) + (yes + no) * s.l;
  }
};

// max(0, 1 - y s) of a score s and a label y of -1 or 1.
template <class R, int>
struct Hinge : Regression {
  FL_FN explicit Hinge(const double*) {}
  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F margin = 1 - v[0] * v[1];
    const auto met = margin <= 0;
    d[0] = select(met, F{}, -v[1]);
    d[1] = select(met, F{}, -v[0]);
    return select(met, F{}, margin);
  }
};

// q (log q - x) of a log-probability x, for the target q, or log q (variant 1). A class that neither
// distribution has, or whose q tends to 0 for an infinite log q, adds nothing.
template <class R, int kLogTarget>
struct KLDivergence : Regression {
  static constexpr int kVariants = 2;
  FL_HPARAMS(log_target);
  static int variant(const double* hparams) { return hparams[H::log_target] != 0; }
  FL_FN explicit KLDivergence(const double*) {}
  template <class F>
  FL_FN F operator()(const F* v, F* d) const {
    const F x = v[0], q = kLogTarget ? exp(v[1]) : v[1], log_q = kLogTarget ? v[1] : log(v[1]);
    d[0] = -q;
    if constexpr (kLogTarget) {
      const F value = select((q == 0) & (x == x), F{}, q * (log_q - x));
      d[1] = value + q;
      return value;
    } else {
      const auto nowhere = (q == 0) & (x == -R(INFINITY));
      d[1] = log_q + 1 - x;
      return weighed(q, log_q) - select(nowhere, F{}, q * x);
    }
  }
};

}  // namespace fastloss::inline FL_ISA

// The pointwise losses: name of the operator and struct.
#define FASTLOSS_POINTWISE_LOSSES(X)                                                 \
  X(sigmoid_focal_loss, SigmoidFocal)                                                \
  X(mse_loss, SquaredError)                                                          \
  X(l1_loss, AbsoluteError)                                                          \
  X(smooth_l1_loss, SmoothAbsoluteError)                                             \
  X(huber_loss, Huber)                                                               \
  X(log_cosh_loss, LogCosh)                                                          \
  X(binary_cross_entropy, BinaryCrossEntropy)                                        \
  X(binary_cross_entropy_with_logits, BinaryCrossEntropyWithLogits)                  \
  X(weighted_binary_cross_entropy_with_logits, WeightedBinaryCrossEntropyWithLogits) \
  X(hinge_loss, Hinge)                                                               \
  X(kl_div, KLDivergence)

// All losses of the elements driver: whoever asks for them includes preference.h and policy.h too.
#define FASTLOSS_ELEMENT_LOSSES(X) \
  FASTLOSS_POINTWISE_LOSSES(X) FASTLOSS_PREFERENCE_LOSSES(X) FASTLOSS_POLICY_LOSSES(X)
