// The theta at which cvar and chi2 are smallest, see aggregate.h. Both are smallest at a theta up to which a
// condition holds, that is monotone in theta:
//   cvar   the weights of the losses above theta are at least (1 - q) W
//   chi2   W sum(w e^2) <= (1 + 2 rho) sum(w e)^2, the derivative is negative
// Numbers of a type are in the order of their bits, taken as integers (those of negative ones inverted), so
// the last number of the losses' type for which it holds is found digit by digit. `theta` is the one after
// it: the losses from there on are those that matter. Of T a driver makes R by widen(T).
#pragma once
#include <cstring>

#include "../math/scalar_math.h"
#include "aggregation_args.h"

namespace fastloss::inline FL_ISA {

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
    // below the lowest loss the condition is asked at it; excesses are halved and divided by the largest, so
    // that they neither overflow nor vanish
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
    const double worst = (1 - a.number) * s.total;
    take_digit<R, T>(a, s, widen, [&](int c) { return sums[c] >= worst; });
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
