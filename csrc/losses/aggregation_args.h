// What a kernel that reduces the losses of samples to one number is told, on CPU and CUDA alike. Plain data:
// no torch.
#pragma once
#include <cstdint>

#include "../math/dtype.h"

namespace fastloss {

// cvar and chi2 find the theta that minimises them, cvar_at and chi2_at are given it.
enum class Aggregate : int { mean, cvar, cvar_at, chi2, chi2_at, soft_ad, tilted };

// A pass over the samples adds up a few numbers, from which the state is brought up to date.
enum class AggregatePass : int { extremes, tail_search, excess_search, moments, spread };

// A search goes through the bits of a number, this many at a time.
inline constexpr int kDigitBits = 4, kCandidates = (1 << kDigitBits) - 1;
inline constexpr int kMostSums = 2 * kCandidates, kMostTops = 2, kMostPasses = 64 / kDigitBits + 3;

struct AggregateState {
  double total;      // of the weights; NaN once a loss was
  double low, high;  // the extreme losses
  double theta, centre;
  double value, theta_slope;  // the result, and its derivative by theta
  double factor[3];           // of the gradient, as its kind reads them
  double tilt, near;          // tilted: t, or 0 where that makes no difference; whether exponents are near 0
  uint64_t key;               // the digits found
  int64_t shift;              // where the next one stands
  double candidate[kCandidates], inverse[kCandidates];
};
inline constexpr int kStateNumbers = sizeof(AggregateState) / sizeof(double);

struct AggregateArgs {
  Aggregate kind;
  DType dtype;  // of losses and their gradient
  int64_t n;
  const void* losses;     // [n]
  const void* weight;     // [n] in the accumulation type; null: 1
  const void* theta;      // one number in it, or null
  double number, eta;     // q, rho, sigma or t
  double flood;           // the level of flooding; NaN: none
  AggregateState* state;  // forward's result, which backward needs
  void* value;            // one number in the accumulation type
  double* partial;        // [kMostSums + kMostTops][partials]
  int64_t partials;       // the parts that are summed on their own: their number depends on n alone
  const void* upstream;   // backward: one number in the accumulation type
  void* gradient;         // backward: [n]
  void* theta_gradient;   // backward: one number in it, or null
  AggregatePass plan[kMostPasses];
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
