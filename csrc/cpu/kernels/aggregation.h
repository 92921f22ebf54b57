// How a CPU reduces losses of samples, chosen for the instruction set of this machine.
#pragma once
#include <cstdint>

#include "../../losses/aggregation.h"
#include "../dispatch.h"

namespace fastloss::cpu {

inline constexpr int64_t kAggregatePart = 16384;  // samples that are summed on their own

struct AggregateKernels {
  // Sums of parts begin, ..., end - 1 of `partial`.
  void (*sum)(const AggregateArgs& args, AggregatePass pass, int64_t begin, int64_t end);
  // Brings the state up to date by the sums of all parts; after the last pass the value.
  void (*finish)(const AggregateArgs& args, AggregatePass pass);
  // Gradient of the samples of parts begin, ..., end - 1, and with the first one of theta.
  void (*gradient)(const AggregateArgs& args, int64_t begin, int64_t end);
};
FASTLOSS_PER_ISA(AggregateKernels, aggregate_kernels)

}  // namespace fastloss::cpu
