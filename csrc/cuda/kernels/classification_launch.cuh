// The choice of a row loss's kernel by its variant, for the files that compile them.
#pragma once
#include "classification.cuh"
#include "rows.cuh"

namespace fastloss::cuda {

// A loss that supports softcap, in a call without: no branch for each class.
template <class Loss>
struct Uncapped : Loss {
  static constexpr bool kSoftcap = false;
  using Loss::Loss;
};

template <template <class, int> class Loss, class T, int kVariant = 0>
void run_rows(const RowArgs& a, cudaStream_t stream) {
  if constexpr (kVariant < Loss<float, 0>::kVariants) {
    if (a.variant != kVariant) return run_rows<Loss, T, kVariant + 1>(a, stream);
    using L = Loss<acc_t<T>, kVariant>;
    if constexpr (L::kSoftcap && sizeof(T) < 8)
      if (!(a.softcap > 0)) return launch_rows<Uncapped<L>, T>(a, stream);
    launch_rows<L, T>(a, stream);
  }
}

#define FASTLOSS_LAUNCHER(name, Loss)                                 \
  template <class T>                                                  \
  void RowLaunchers<T>::name(const RowArgs& a, cudaStream_t stream) { \
    run_rows<Loss, T>(a, stream);                                     \
  }
FASTLOSS_ROW_KERNELS(FASTLOSS_LAUNCHER)
#undef FASTLOSS_LAUNCHER

}  // namespace fastloss::cuda
