// Reductions of the losses of n samples to one number: what each pass over them adds up, what follows from
// the sums, and the gradient. With weights w, of sum W, and relu(x - theta) = e, the value is
//   mean      sum(w x) / W
//   cvar_at   theta + sum(w e) / ((1 - q) W)
//   chi2_at   theta + sqrt((1 + 2 rho) sum(w e^2) / W)
//   soft_ad   eta theta + sigma^2 sum(w r(u)) / W,  u = (x - theta) / sigma,  r(u) = sqrt(1 + u^2) - 1
//   tilted    log(sum(w exp(t x)) / W) / t
//   cvar, chi2    the two above at their smallest, found by a search (below)
// and, where there is a level b of flooding, |value - b| + b of it.
//
// A pass is a struct over R, float or double, with the numbers of its sums and maxima, add(x, w, sums, tops)
// for F, which is R or a vector of it, and finish, which brings the state up to date. A sample of weight 0
// comes as x = 0, which may be far from all that count: what is infinite there is selected away.
#pragma once
#include <cstdint>
#include <cstring>

#include "../drivers/names.h"
#include "../math/dtype.h"
#include "../math/math.h"

namespace fastloss {

// cvar and chi2 find the theta that minimises them, cvar_at and chi2_at are given it.
FL_ENUM(Aggregate, mean, cvar, cvar_at, chi2, chi2_at, soft_ad, tilted)

// A pass over the samples: a few sums and maxima, from which the state is updated.
enum class AggregatePass : int { extremes, tail_search, excess_search, moments, spread };

// A search goes through the bits of a number, this many at a time.
inline constexpr int kDigitBits = 4, kCandidates = (1 << kDigitBits) - 1;
inline constexpr int kMaxSums = 2 * kCandidates, kMaxTops = 2, kMaxPasses = 64 / kDigitBits + 3;

struct AggregateState {
  double total;      // of the weights; NaN once a loss was
  double low, high;  // the extreme losses
  double theta, centre;
  double value, theta_slope;  // the result, and its derivative by theta
  double factor[3];           // of the gradient; their meaning depends on the kind
  double tilt, near;          // tilted: t, or 0 where it makes no difference; whether exponents are near 0
  uint64_t key;               // the digits found
  int64_t shift;              // where the next one stands
  double candidate[kCandidates], inverse[kCandidates];
};
inline constexpr int kStateNumbers = sizeof(AggregateState) / sizeof(double);

// The arguments of the kernels, on CPU and CUDA alike. Plain data: no torch.
struct AggregateArgs {
  Aggregate kind;
  DType dtype;  // of losses and their gradient
  int64_t n;
  const void* losses;              // [n]
  const void* weight;              // [n] in the accumulation type; null: 1
  const void* theta;               // one number in it, or null
  double number, eta;              // q, rho, sigma or t
  double flood;                    // the level of flooding; NaN: none
  AggregateState* state;           // forward's result, which backward needs
  void* value;                     // one number in the accumulation type
  double* partial;                 // [kMaxSums + kMaxTops][partials]
  int64_t partials;                // the parts that are summed on their own: their number depends on n alone
  const void* upstream;            // backward: one number in the accumulation type
  void* gradient;                  // backward: [n]
  void* theta_gradient;            // backward: one number in it, or null
  AggregatePass plan[kMaxPasses];  // in this order, each over all samples
  int passes;
};

inline void plan_passes(AggregateArgs& a) {
  const int bits = a.dtype == DType::f64 ? 64 : a.dtype == DType::f32 ? 32 : 16;
  const bool searches = a.kind == Aggregate::cvar || a.kind == Aggregate::chi2;
  if (searches || a.kind == Aggregate::tilted) a.plan[a.passes++] = AggregatePass::extremes;
  for (int digit = 0; searches && digit < bits / kDigitBits; ++digit)
    a.plan[a.passes++] =
        a.kind == Aggregate::cvar ? AggregatePass::tail_search : AggregatePass::excess_search;
  a.plan[a.passes++] = AggregatePass::moments;
  if (a.kind == Aggregate::chi2) a.plan[a.passes++] = AggregatePass::spread;
}

}  // namespace fastloss

namespace fastloss::inline FL_ISA {

// The theta at which cvar and chi2 are smallest. Both are smallest at a theta up to
// which a condition holds, that is monotone in theta:
//   cvar   the weights of the losses above theta are at least (1 - q) W
//   chi2   W sum(w e^2) <= (1 + 2 rho) sum(w e)^2, the derivative is negative
// Numbers of a type are in the order of their bits, taken as integers (those of negative ones inverted), so
// the last number of the losses' type for which it holds is found digit by digit. `theta` is the one after
// it: the losses from there on are those that matter. Of T a driver makes R by widen(T).

template <class T, class Widen>
FL_FN double number_of_key(uint64_t key, Widen widen) {
  constexpr int kBits = 8 * sizeof(T);
  constexpr uint64_t kSign = uint64_t{1} << (kBits - 1);
  const uint64_t bits = key & kSign ? key ^ kSign : ~key;
  T x;
  std::memcpy(static_cast<void*>(&x), &bits, sizeof x);  // the low bytes
  return widen(x);
}

template <class R>
FL_FN double reciprocal(double x) {
  return min(1 / x, sizeof(R) == 4 ? 3e38 : 1e308);
}

template <class R, class T, class Widen>
FL_FN void place_candidates(const AggregateArgs& a, AggregateState& s, Widen widen) {
  for (int c = 0; c < kCandidates; ++c) {
    const double v = number_of_key<T>(s.key + (uint64_t(c + 1) << s.shift), widen);
    s.candidate[c] = v;
    if (a.kind != Aggregate::chi2) continue;
    // Below the lowest loss the condition is evaluated at that loss. Excesses are halved and divided by the
    // largest, so that they neither overflow nor underflow.
    const double at = max(v, s.low);
    const bool inside = at > -INFINITY && at < s.high;
    s.candidate[c] = inside ? at / 2 : 0;
    s.inverse[c] = inside ? reciprocal<R>(s.high / 2 - at / 2) : 0;
  }
}

// The candidate is no number but below all of them: its condition holds whatever the sums say.
template <class T, class Widen>
FL_FN bool below_all(const AggregateState& s, int c, Widen widen) {
  const uint64_t key = s.key + (uint64_t(c + 1) << s.shift);
  if (key >> (8 * sizeof(T) - 1)) return false;
  const double v = number_of_key<T>(key, widen);
  return v != v;
}

template <class R, class T, class Widen, class Holds>
FL_FN void take_digit(const AggregateArgs& a, AggregateState& s, Widen widen, Holds holds) {
  int digit = 0;
  while (digit < kCandidates && (below_all<T>(s, digit, widen) || holds(digit))) ++digit;
  s.key += uint64_t(digit) << s.shift;
  if (s.shift == 0) {
    s.theta = max(number_of_key<T>(s.key + 1, widen), s.low);
    return;
  }
  s.shift -= kDigitBits;
  place_candidates<R, T>(a, s, widen);
}

template <class R>
struct TailSearch {
  static constexpr int kSums = kCandidates, kTops = 0;
  R v[kCandidates];
  FL_FN TailSearch(const AggregateArgs&, const AggregateState& s) {
    for (int c = 0; c < kCandidates; ++c) v[c] = R(s.candidate[c]);
  }

  template <class F>
  FL_FN void add(F x, F w, F* sums, F*) const {
    for (int c = 0; c < kCandidates; ++c) sums[c] += select(x > v[c], w, F{});
  }

  template <class T, class Widen>
  static FL_FN void finish(const AggregateArgs& a, const double* sums, const double*, AggregateState& s,
                           Widen widen) {
    const double tail_weight = (1 - a.number) * s.total;
    take_digit<R, T>(a, s, widen, [&](int c) { return sums[c] >= tail_weight; });
  }
};

template <class R>
struct ExcessSearch {
  static constexpr int kSums = 2 * kCandidates, kTops = 0;
  R half[kCandidates], inverse[kCandidates];
  FL_FN ExcessSearch(const AggregateArgs&, const AggregateState& s) {
    for (int c = 0; c < kCandidates; ++c) {
      half[c] = R(s.candidate[c]);
      inverse[c] = R(s.inverse[c]);
    }
  }

  template <class F>
  FL_FN void add(F x, F w, F* sums, F*) const {
    x *= R(0.5);
    for (int c = 0; c < kCandidates; ++c) {
      const F e = max(x - half[c], F{}) * inverse[c], we = w * e;
      sums[c] += we;
      sums[kCandidates + c] += we * e;
    }
  }

  template <class T, class Widen>
  static FL_FN void finish(const AggregateArgs& a, const double* sums, const double*, AggregateState& s,
                           Widen widen) {
    const double radius = 1 + 2 * a.number;
    take_digit<R, T>(a, s, widen, [&](int c) {
      const double first = sums[c], second = sums[kCandidates + c];
      return first > 0 && s.total * second <= radius * first * first;
    });
  }
};

}  // namespace fastloss::inline FL_ISA

namespace fastloss::inline FL_ISA {

// The value is known: flood it, and give it out.
template <class R>
FL_FN void write_value(const AggregateArgs& a, AggregateState& s) {
  if (a.flood == a.flood) {
    const double above = s.value - a.flood, sign = (above > 0) - (above < 0);
    s.value = abs(above) + a.flood;
    s.theta_slope *= sign;
    for (double& factor : s.factor) factor *= sign;
  }
  *static_cast<R*>(a.value) = R(s.value);
}

// Sums of weights are exact to what the sum and `lost` hold together: the derivatives at the edge of a tail
// are their differences.
template <class F>
FL_FN void add_weight(F w, F& sum, F& lost) {
  const F next = sum + w, added = next - sum;
  lost += (sum - (next - added)) + (w - added);
  sum = next;
}

template <class R>
struct Extremes {
  static constexpr int kSums = 3, kTops = 2;
  FL_FN Extremes(const AggregateArgs&, const AggregateState&) {}

  template <class F>
  FL_FN void add(F x, F w, F* sums, F* tops) const {
    const auto counts = w != 0;
    const F lowest = fill<F>(-INFINITY);
    add_weight(w, sums[0], sums[1]);
    sums[2] += select(x != x, w, F{});
    tops[0] = max(select(counts, x, lowest), tops[0]);
    tops[1] = max(select(counts, -x, lowest), tops[1]);
  }

  template <class T, class Widen>
  static FL_FN void finish(const AggregateArgs& a, const double* sums, const double* tops, AggregateState& s,
                           Widen widen) {
    s = {};
    s.total = sums[2] != 0 ? NAN : sums[0] + sums[1];
    s.high = tops[0];
    s.low = -tops[1];
    s.key = 0;
    s.shift = 8 * sizeof(T) - kDigitBits;
    place_candidates<R, T>(a, s, widen);
    // tilted: exponents are relative to their largest; where all are near 0, log(1 + mean(e^x - 1)) is exact,
    // and where they are as good as 0 so is the mean
    const double t = a.number, spread = abs(t) * (s.high - s.low), tiny = sizeof(R) == 4 ? 2e-8 : 5e-17;
    s.centre = t < 0 ? s.low : s.high;
    s.tilt = spread < tiny ? 0 : t;
    s.near = spread < 1;
  }
};

// ---- what the value is made of

// r(u) / u and r'(u), for infinite u too.
template <class F>
struct SoftSlope {
  F chord, slope;
};
template <class F>
FL_FN SoftSlope<F> soft_slope(F u) {
  const F root = sqrt(1 + u * u), sign = copysign(F{} + 1, u);
  const auto is_large = abs(u) > scalar_t<F>(sizeof(scalar_t<F>) == 4 ? 1e9 : 1e17);
  return {select(is_large, sign, u / (1 + root)), select(is_large, sign, u / root)};
}

template <class R>
FL_FN R given_theta(const AggregateArgs& a, const AggregateState& s) {
  return a.theta ? *static_cast<const R*>(a.theta) : R(s.theta);
}

template <class R>
struct Moments {
  static constexpr int kSums = 8, kTops = 0;
  Aggregate kind;
  R theta, sigma, centre, t;
  bool near;
  FL_FN Moments(const AggregateArgs& a, const AggregateState& s)
      : kind(a.kind),
        theta(given_theta<R>(a, s)),
        sigma(R(a.number)),
        centre(R(s.centre)),
        t(R(s.tilt)),
        near(s.near != 0) {}

  template <class F>
  FL_FN void add(F x, F w, F* sums, F*) const {
    const auto counts = w != 0;
    add_weight(w, sums[0], sums[1]);
    if (kind == Aggregate::mean) {
      sums[2] += w * x;
    } else if (kind == Aggregate::soft_ad) {
      const F u = (x - theta) / sigma;
      const SoftSlope<F> r = soft_slope(u);
      sums[2] += select(counts, w * (u * r.chord), F{});
      sums[3] += select(counts, w * r.slope, F{});
    } else if (kind == Aggregate::tilted) {
      const F d = x - centre;
      sums[2] += select(counts, w * (t == 0 ? d : near ? expm1(t * d) : exp(t * d)), F{});
    } else {
      const F e = select(x <= theta, F{}, x - theta), we = select(counts, w * e, F{});  // NaN stays
      sums[2] += we;
      sums[3] += select(counts, we * e, F{});
      add_weight(select(x > theta, w, F{}), sums[4], sums[5]);
      add_weight(select(x == theta, w, F{}), sums[6], sums[7]);
    }
  }

  template <class T, class Widen>
  static FL_FN void finish(const AggregateArgs& a, const double* sums, const double*, AggregateState& s,
                           Widen) {
    const double theta = given_theta<R>(a, s), part = sums[2];
    const double above = sums[4] + sums[5], equal = sums[6] + sums[7];
    const bool counted =
        a.kind == Aggregate::cvar || a.kind == Aggregate::chi2 || a.kind == Aggregate::tilted;
    if (!counted) s = {};
    const double total = counted ? s.total : sums[0] + sums[1];
    s.total = total;
    switch (a.kind) {
      case Aggregate::mean:
        s.value = part / total;
        s.factor[0] = 1 / total;
        break;
      case Aggregate::cvar: {  // what is left of (1 - q) W is shared by the losses at theta
        const double tail_weight = (1 - a.number) * total;
        s.value = theta == -INFINITY && total == total ? theta : theta + part / tail_weight;
        s.factor[0] = 1 / tail_weight;
        s.factor[1] = (tail_weight - above) / (tail_weight * equal);
        s.factor[2] = total == total ? 0 : total;
        break;
      }
      case Aggregate::cvar_at: {
        const double tail_weight = (1 - a.number) * total;
        s.value = theta + part / tail_weight;
        s.theta_slope = total == 0 ? 1 : (tail_weight - above) / tail_weight;
        s.factor[0] = 1 / tail_weight;
        break;
      }
      case Aggregate::chi2:  // the value follows from the spread around this
        s.theta = theta;
        s.factor[0] = theta <= s.low ? total : above + equal;
        s.centre = theta + part / s.factor[0];
        s.inverse[0] = s.high > theta ? reciprocal<R>(s.high - theta) : 0;
        return;
      case Aggregate::chi2_at: {
        const double scale = sqrt(1 + 2 * a.number), root = sqrt(sums[3] / total);
        s.value = theta + scale * root;
        s.factor[0] = root == 0 ? 0 : scale / (total * root);
        s.theta_slope = total == 0 ? 1 : 1 - s.factor[0] * part;
        break;
      }
      case Aggregate::soft_ad:
        s.value = a.eta * theta + a.number * a.number * (part / total);
        s.factor[0] = a.number / total;
        s.theta_slope = total == 0 ? a.eta : a.eta - s.factor[0] * sums[3];
        break;
      case Aggregate::tilted: {
        const double t = s.tilt;
        if (abs(s.centre) == INFINITY) {
          s.value = total > 0 ? s.centre : NAN;
          s.factor[0] = total > 0 ? 1 : NAN;
        } else if (t == 0) {
          s.value = s.centre + part / total;
          s.factor[0] = 1 / total;
        } else if (s.near != 0) {
          s.value = s.centre + log1p(part / total) / t;
          s.factor[0] = 1 / (total + part);
        } else {
          s.value = s.centre + log(part / total) / t;
          s.factor[0] = 1 / part;
        }
        break;
      }
    }
    write_value<R>(a, s);
  }
};

// chi2: with m and v the mean and variance of the losses from theta on, and p their fraction of the weights,
// the smallest value is m + sqrt(v ((1 + 2 rho) p - 1)).
template <class R>
struct Spread {
  static constexpr int kSums = 2, kTops = 0;
  R theta, centre, inverse;
  FL_FN Spread(const AggregateArgs&, const AggregateState& s)
      : theta(R(s.theta)), centre(R(s.centre)), inverse(R(s.inverse[0])) {}

  template <class F>
  FL_FN void add(F x, F w, F* sums, F*) const {
    const F d = select((x >= theta) & (w != 0), (x - centre) * inverse, F{}), wd = w * d;
    sums[0] += wd;
    sums[1] += wd * d;
  }

  template <class T, class Widen>
  static FL_FN void finish(const AggregateArgs& a, const double* sums, const double*, AggregateState& s,
                           Widen) {
    const double weight = s.factor[0], fraction = weight / s.total, size = s.high - s.theta;
    const double moved = sums[0] / weight, variance = sums[1] / weight - moved * moved;
    const double beyond = 2 * a.number * fraction + (fraction - 1), radius = beyond < 0 ? 0 : beyond;
    const double steep = variance <= 0 ? 0 : sqrt(radius / variance);
    s.centre = R(s.centre);
    s.value = s.centre + size * (moved + (variance <= 0 ? 0 : sqrt(variance * radius)));
    s.factor[0] = (1 - moved * steep) / weight;
    s.factor[1] = size > 0 ? steep / size / weight : 0;
    s.factor[2] = s.total == s.total ? 0 : s.total;
    if (s.high == INFINITY) s.value = s.total == s.total ? s.high : s.total;
    write_value<R>(a, s);
  }
};

// Calls body.operator()<Pass>() for the pass of this name over R.
template <class R, class Body>
FL_FN void with_pass(AggregatePass pass, Body body) {
  switch (pass) {
    case AggregatePass::extremes:
      return body.template operator()<Extremes<R>>();
    case AggregatePass::tail_search:
      return body.template operator()<TailSearch<R>>();
    case AggregatePass::excess_search:
      return body.template operator()<ExcessSearch<R>>();
    case AggregatePass::moments:
      return body.template operator()<Moments<R>>();
    case AggregatePass::spread:
      return body.template operator()<Spread<R>>();
  }
}

// ---- the gradient

template <class R>
struct AggregateGradient {
  Aggregate kind;
  R theta, centre, number, g[3];
  FL_FN AggregateGradient(const AggregateArgs& a, const AggregateState& s, R upstream)
      : kind(a.kind),
        theta(given_theta<R>(a, s)),
        centre(R(s.centre)),
        number(R(a.kind == Aggregate::tilted ? s.tilt : a.number)) {
    for (int i = 0; i < 3; ++i) g[i] = R(s.factor[i] * upstream);
  }
  template <class F>
  FL_FN F operator()(F x) const {
    switch (kind) {
      case Aggregate::cvar:
      case Aggregate::cvar_at:
        return select(x > theta, fill<F>(g[0]), select(x == theta, fill<F>(g[1]), fill<F>(g[2])));
      case Aggregate::chi2:
        return select(x >= theta, g[0] + g[1] * (x - centre), fill<F>(g[2]));
      case Aggregate::chi2_at:
        return select(x <= theta, F{}, g[0] * (x - theta));
      case Aggregate::soft_ad:
        return g[0] * soft_slope((x - theta) / number).slope;
      case Aggregate::tilted:
        return g[0] * exp(number * (x - centre));
      default:
        return fill<F>(g[0]);
    }
  }
};

}  // namespace fastloss::inline FL_ISA
