// The CPU kernels of reductions of losses of samples, for one instruction set each.
#pragma once
#include <cstdint>

#include "../../losses/aggregation.h"
#include "../dispatch.h"

namespace fastloss::cpu {

inline constexpr int64_t kAggregatePart = 16384;  // samples of one partial sum

struct AggregateKernels {
  // Sums of parts begin, ..., end - 1 of `partial`.
  void (*sum)(const AggregateArgs& args, AggregatePass pass, int64_t begin, int64_t end);
  // Updates the state from the sums of all parts; after the last pass writes the value.
  void (*finish)(const AggregateArgs& args, AggregatePass pass);
  // The gradient of the samples of parts begin, ..., end - 1; part 0 also writes that of theta.
  void (*gradient)(const AggregateArgs& args, int64_t begin, int64_t end);
};
FASTLOSS_PER_ISA(AggregateKernels, aggregate_kernels)

}  // namespace fastloss::cpu
