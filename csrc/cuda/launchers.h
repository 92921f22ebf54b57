// The kernels' launchers, as the operators see them: raw pointers and a stream, no torch.
#pragma once
#include "../drivers/elements.h"
#include "../drivers/rows.h"
#include "../drivers/scan.h"
#include "../drivers/similarity.h"
#include "../losses/aggregation.h"
#include "../losses/classification.h"
#include "../losses/ctc.h"
#include "../losses/distillation.h"
#include "../losses/elementwise.h"
#include "../losses/feature_sums.h"
#include "../losses/policy.h"
#include "../losses/preference.h"
#include "../losses/returns.h"
#include "../losses/reward_model.h"
#include "../losses/survival.h"
#include "../losses/triplets.h"

namespace fastloss::cuda {

// norm[0] = sum over rows, except ignored ones, of row weight times class weight of the target.
void row_norm(const RowArgs& args, void* norm, void* stream);
// out[0] = sum of loss over rows [/ norm], in a fixed order; of the accumulation type, or with narrow_result
// of that of the logits.
void row_reduce(const RowArgs& args, void* out, void* stream);

#define FASTLOSS_LAUNCHER(name, Loss) void name(const RowArgs& args, void* stream);
FASTLOSS_ROW_KERNELS(FASTLOSS_LAUNCHER)
#undef FASTLOSS_LAUNCHER

void divergence(const DivergenceArgs& args, void* stream);

#define FASTLOSS_LAUNCHER(name, Loss) void name(const ScanArgs& args, void* stream);
FASTLOSS_SCANS(FASTLOSS_LAUNCHER)
#undef FASTLOSS_LAUNCHER

void ranking(const RankingArgs& args, void* stream);
void survival(const SurvivalArgs& args, void* stream);
void alignment(const AlignmentArgs& args, void* stream);

// The number of partial sums of n samples: AggregateArgs::partials.
int64_t aggregate_partials(int64_t n);
void aggregate(const AggregateArgs& args, void* stream);
void aggregate_gradient(const AggregateArgs& args, void* stream);

// The number of partial sums that a call with n elements of this type leaves in ElementArgs::partial.
int64_t element_partials(DType dtype, int64_t n);
#define FASTLOSS_LAUNCHER(name, Loss) void name(const ElementArgs& args, void* stream);
FASTLOSS_ELEMENT_LOSSES(FASTLOSS_LAUNCHER)
#undef FASTLOSS_LAUNCHER

// p *= factor; if the factor is 1, p is not read.
void scale(const ScaleArgs& args, void* stream);

void feature_pairs(const FeatureArgs& args, void* stream);
// The size of TileChunk::part for this pass and block, in numbers of the accumulation type.
int64_t tile_partials(const TileChunk& args);
// One pass over a block of similarities. Blocks are passed row by row, in the order of their columns.
void tile_chunk(const TileChunk& args, void* stream);
// The anchors of one chunk; a backward pass adds to dx.
void triplets(const TripletArgs& args, void* stream);

}  // namespace fastloss::cuda
