// What a kernel of survival losses is told, on CPU and CUDA alike. Plain data: no torch.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "../math/scalar_math.h"

namespace fastloss {

inline constexpr int kSurvivalItem = 5;  // words of an element of a scan, at most

enum class Survival : int { cox, dart };

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
};

// How many numbers of each individual backward needs.
FL_FN int64_t state_width(const SurvivalArgs& a) { return a.kind == Survival::dart ? 1 : (a.efron ? 4 : 2); }

// A GPU takes a cohort in tiles: `partial` has one number for each, `items` kSurvivalItem.
inline constexpr int kSurvivalThreads = 256, kSurvivalSteps = 8;
inline constexpr int64_t kSurvivalTile = kSurvivalThreads * kSurvivalSteps;
FL_FN int64_t survival_tiles(const SurvivalArgs& a) { return (a.n + kSurvivalTile - 1) / kSurvivalTile; }

}  // namespace fastloss
