// The choice of a row loss's kernel by its variant and type.
#pragma once
#include "../launchers.h"
#include "rows.cuh"

namespace fastloss::cuda {

// A loss whose logits may be capped, where they are not: no class has to ask.
template <class Loss>
struct Uncapped : Loss {
  static constexpr bool kSoftcap = false;
  using Loss::Loss;
};

template <template <class, int> class Loss, int kVariant>
void run_dtype(const RowArgs& a, cudaStream_t stream) {
  with_device_type(a.dtype, [&]<class T> {
    using Own = Loss<acc_t<T>, kVariant>;
    if constexpr (Own::kSoftcap && sizeof(T) < 8)
      if (!(a.softcap > 0)) return launch_rows<Uncapped<Own>, T>(a, stream);
    launch_rows<Own, T>(a, stream);
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
