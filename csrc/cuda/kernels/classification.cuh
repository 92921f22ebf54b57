// Launchers of the row losses for one type of logits. A type has a file of its own, classification_<type>.cu,
// since nvcc takes minutes for all four: these are compiled at the same time, and a new loss adds to each.
#pragma once
#include "../launchers.h"

namespace fastloss::cuda {

template <class T>
struct RowLaunchers {
#define FASTLOSS_LAUNCHER(name, Loss) static void name(const RowArgs& a, cudaStream_t stream);
  FASTLOSS_ROW_KERNELS(FASTLOSS_LAUNCHER)
#undef FASTLOSS_LAUNCHER
};

}  // namespace fastloss::cuda
