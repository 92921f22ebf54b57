// The choice of a row loss's kernel by its variant and type.
#pragma once
#include "../launchers.h"
#include "rows.cuh"

namespace fastloss::cuda {

// A loss that supports softcap, in a call without: no branch for each class.
template <class Loss>
struct Uncapped : Loss {
  static constexpr bool kSoftcap = false;
  using Loss::Loss;
};

template <template <class, int> class Loss, int kVariant>
void run_dtype(const RowArgs& a, cudaStream_t stream) {
  with_device_type(a.dtype, [&]<class T> {
    using L = Loss<acc_t<T>, kVariant>;
    if constexpr (L::kSoftcap && sizeof(T) < 8)
      if (!(a.softcap > 0)) return launch_rows<Uncapped<L>, T>(a, stream);
    launch_rows<L, T>(a, stream);
  });
}
template <template <class, int> class Loss, int kVariant = 0>
void run_rows(const RowArgs& a, cudaStream_t stream) {
  if constexpr (kVariant < Loss<float, 0>::kVariants) {
    if (a.variant == kVariant) return run_dtype<Loss, kVariant>(a, stream);
    run_rows<Loss, kVariant + 1>(a, stream);
  }
}

}  // namespace fastloss::cuda
