// Survival losses: a scan along the sorted cohort each way, and what is read off it. `Forward` and `Back` are
// elements of the two scans, with an associative `then`; where `kReversed`, a scan runs from the last place
// to the first. After forward's, `value(p)` is the loss of the individual at place p; after back's,
// `gradient(p)` its derivative. `Cohort` is one row of the arguments.
#pragma once
#include <cstdint>

#include "../drivers/names.h"
#include "../math/dtype.h"
#include "../math/math.h"
#include "../math/scaled.h"

namespace fastloss {

inline constexpr int kSurvivalItem = 5;  // words of an element of a scan, at most

FL_ENUM(Survival, cox, dart)

// The arguments of the survival kernels, on CPU and CUDA alike. Plain data: no torch.
//
// Cohorts of n individuals each. `order` sorts a cohort; in that order, equals stand together and bear the
// same number in `group`, and so do the members of a stratum. Whatever the type of `score`, sums over a
// cohort, which may have millions of terms, are in float64.
struct SurvivalArgs {
  Survival kind;
  bool backward;
  bool efron;              // cox: how ties are handled
  double alpha, beta;      // dart: weights of the mean squares
  DType dtype;             // of score and gradient
  int64_t rows, n;         // [rows, n], contiguous
  const void* score;       // log hazard, or the prediction of log time
  const double* log_time;  // dart
  const uint8_t* events;
  const int64_t *order, *group, *stratum;  // by place in the order; stratum or null: one
  double* state;                           // [rows, n, state_width] by place: of forward, for backward
  double *loss, *total;                    // forward: [rows, n] or null, and their sum or null
  const double* upstream;                  // backward: [rows, n], or one number
  bool each;                               // upstream is one for each
  double* slope;                           // backward: [rows, n, 2], scratch; a row's on the CPU
  void* gradient;                          // backward: [rows, n]
  double *partial, *items;                 // scratch, see survival_tiles

  // Numbers that forward saves for backward, for each individual.
  FL_FN int64_t state_width() const { return kind == Survival::dart ? 1 : (efron ? 4 : 2); }
};

// A GPU takes a cohort in tiles: `partial` has one number for each, `items` kSurvivalItem.
inline constexpr int kSurvivalThreads = 256, kSurvivalSteps = 8;
inline constexpr int64_t kSurvivalTile = kSurvivalThreads * kSurvivalSteps;
FL_FN int64_t survival_tiles(const SurvivalArgs& a) { return (a.n + kSurvivalTile - 1) / kSurvivalTile; }

}  // namespace fastloss

namespace fastloss::inline FL_ISA {

struct Cohort {
  const SurvivalArgs& a;
  int64_t base, n;  // the row's first number

  FL_FN Cohort(const SurvivalArgs& args, int64_t row) : a(args), base(row * args.n), n(args.n) {}
  FL_FN int64_t individual(int64_t p) const { return base + a.order[base + p]; }
  FL_FN bool event(int64_t p) const { return a.events[individual(p)] != 0; }
  FL_FN double upstream(int64_t p) const { return a.upstream[a.each ? individual(p) : 0]; }
  FL_FN double* state(int64_t p) const { return a.state + (base + p) * a.state_width(); }
  FL_FN double* slope(int64_t p) const { return a.slope + (base + p) * 2; }
  FL_FN bool same_group(int64_t p, int64_t q) const { return a.group[base + p] == a.group[base + q]; }
  FL_FN bool same_stratum(int64_t p, int64_t q) const {
    return !a.stratum || a.stratum[base + p] == a.stratum[base + q];
  }
  // The last and the first place of p's group: by steps that double, then halve.
  FL_FN int64_t last_of_group(int64_t p) const { return end_of_group(p, n - 1 - p, 1); }
  FL_FN int64_t first_of_group(int64_t p) const { return end_of_group(p, p, -1); }
  FL_FN int64_t end_of_group(int64_t p, int64_t remaining, int64_t sign) const {
    int64_t inside = 0, step = 1;
    while (step <= remaining && same_group(p, p + sign * step)) inside = step, step *= 2;
    int64_t outside = step <= remaining ? step : remaining + 1;
    while (outside - inside > 1) {
      const int64_t middle = inside + (outside - inside) / 2;
      (same_group(p, p + sign * middle) ? inside : outside) = middle;
    }
    return p + sign * inside;
  }
};

FL_FN double decay(double distance) { return distance == 0 ? 1 : exp(distance); }

// Cox's partial likelihood in the order of falling times: the risk set of place p is all places up to the
// last of p's group. The l-th of d tied events has the loss
//   log(R - l/d D) - h,   R, D = sum of e^h over the risk set and over the tied events;   l = 0 for breslow
// Sums are kept relative to e^top, where top is the largest h so far, rounded to a multiple of 16: nothing
// overflows, no rounding adds up where h creeps upwards, and of moderate h nothing is lost to top.
template <class Score>
struct Cox : Cohort {
  const Score h_of;
  FL_FN Cox(const SurvivalArgs& args, int64_t row, Score score) : Cohort(args, row), h_of(score) {}
  FL_FN double h(int64_t p) const { return h_of(individual(p)); }

  struct Forward {
    static constexpr bool kReversed = false;
    double top = -1e308, risk = 0, tied = 0, events = 0;
    int64_t first = 0;  // 1: a group begins in it, 2: a stratum too
    FL_FN Forward then(const Forward& b) const {
      if (b.first == 2) return b;
      Forward s;
      s.first = first > b.first ? first : b.first;
      s.top = max(top, b.top);
      const double mine = decay(top - s.top), others = decay(b.top - s.top);
      s.risk = risk * mine + b.risk * others;
      s.tied = (b.first ? 0 : tied * mine) + b.tied * others;
      s.events = (b.first ? 0 : events) + b.events;
      return s;
    }
  };
  FL_FN Forward forward(int64_t p) const {
    const double x = h(p), top = floor(x / 16 + 0.5) * 16;
    Forward s;
    s.top = max(s.top, top);
    s.risk = exp(x - s.top);
    s.tied = event(p) ? s.risk : 0;
    s.events = event(p) ? 1 : 0;
    s.first = p == 0 || !same_stratum(p, p - 1) ? 2 : (same_group(p, p - 1) ? 0 : 1);
    return s;
  }
  // The scan's results at place p, for the other places and for the backward pass.
  FL_FN void save(int64_t p, const Forward& s) const {
    double* const out = state(p);
    out[0] = s.top, out[1] = s.risk;
    if (a.efron) out[2] = s.tied, out[3] = s.events;
  }
  FL_FN double fraction_taken(int64_t p, const double* group) const {  // l/d
    return a.efron ? (state(p)[3] - 1) / group[3] : 0;
  }
  FL_FN double at_risk(int64_t p, const double* group) const {
    const double l = fraction_taken(p, group);
    return l > 0 ? group[1] - l * group[2] : group[1];
  }
  FL_FN double value(int64_t p) const {
    if (!event(p)) return 0;
    const double* const group = state(last_of_group(p));
    return (group[0] - h(p)) + log(at_risk(p, group));
  }

  // `sum`: over the events at p and behind it, their upstream gradients over the sum at risk, relative to
  // e^-top of p's group. `tied`: the same over p's group alone, times l/d. `decay`: from the next place's
  // scale to that of p.
  struct Back {
    static constexpr bool kReversed = true;
    double decay = 1, sum = 0, tied = 0;
    int64_t first = 0;
    FL_FN Back then(const Back& b) const {
      return {b.decay == 0 ? 0 : decay * b.decay, (sum == 0 ? 0 : scaled(b.decay, sum)) + b.sum,
              (b.first ? 0 : tied) + b.tied, first | b.first};
    }
  };
  FL_FN Back back(int64_t p) const {
    const double* const group = state(last_of_group(p));
    const bool last = p + 1 == n || !same_stratum(p, p + 1);
    Back s;
    s.first = last || !same_group(p, p + 1);
    s.decay = last ? 0 : (s.first ? decay(group[0] - state(last_of_group(p + 1))[0]) : 1);
    s.sum = event(p) && upstream(p) != 0 ? upstream(p) / at_risk(p, group) : 0;
    s.tied = event(p) ? s.sum * fraction_taken(p, group) : 0;
    return s;
  }
  FL_FN void save(int64_t p, const Back& s) const { slope(p)[0] = s.sum, slope(p)[1] = s.tied; }
  FL_FN double gradient(int64_t p) const {
    const double* const sum = slope(first_of_group(p));
    const double all = event(p) ? sum[0] - sum[1] : sum[0];
    const double risk = all == 0 ? 0 : all * exp(h(p) - state(last_of_group(p))[0]);
    return event(p) ? risk - upstream(p) : risk;
  }
};

// Rank regression of log times, in the order of rising residuals e = log T - theta. With S_p the sum of
// e_q - e_p over all places q behind p, a sum of steps between neighbours in which nothing cancels,
//   loss = event S_p / n + alpha e^2 + beta theta^2
template <class Score>
struct Dart : Cohort {
  const Score theta_of;
  FL_FN Dart(const SurvivalArgs& args, int64_t row, Score score) : Cohort(args, row), theta_of(score) {}
  FL_FN double theta(int64_t p) const { return theta_of(individual(p)); }
  FL_FN double e(int64_t p) const { return a.log_time[individual(p)] - theta(p); }

  template <bool kFromEnd>
  struct Sum {
    static constexpr bool kReversed = kFromEnd;
    double sum = 0;
    FL_FN Sum then(const Sum& b) const { return {sum + b.sum}; }
  };
  using Forward = Sum<true>;
  using Back = Sum<false>;
  FL_FN Forward forward(int64_t p) const {
    const int64_t behind = n - 1 - p, next = behind ? p + 1 : p;  // of the last: 0, or NaN
    if (next > p && same_group(p, next)) return {0};
    return {(e(next) - e(p)) * static_cast<double>(behind ? behind : 1)};
  }
  FL_FN void save(int64_t p, const Forward& s) const { state(p)[0] = s.sum; }
  FL_FN double value(int64_t p) const {
    double v = event(p) ? state(p)[0] / static_cast<double>(n) : 0;
    if (a.alpha != 0) v += a.alpha * e(p) * e(p);
    if (a.beta != 0) v += a.beta * theta(p) * theta(p);
    return v;
  }

  FL_FN Back back(int64_t p) const { return {event(p) ? upstream(p) : 0}; }
  FL_FN void save(int64_t p, const Back& s) const { slope(p)[0] = s.sum; }
  FL_FN double gradient(int64_t p) const {
    const int64_t first = first_of_group(p), behind = n - 1 - last_of_group(p);
    double d = first > 0 ? -slope(first - 1)[0] : 0;
    if (event(p)) d += upstream(p) * static_cast<double>(behind);
    d /= static_cast<double>(n);
    if (a.alpha != 0) d -= 2 * a.alpha * e(p) * upstream(p);
    if (a.beta != 0) d += 2 * a.beta * theta(p) * upstream(p);
    return d;
  }
};

}  // namespace fastloss::inline FL_ISA
