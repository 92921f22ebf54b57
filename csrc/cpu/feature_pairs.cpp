// Sums over pairs of rows (core/feature_pairs.h) for one instruction set: compiled once for each, with FL_ISA
// naming it.
#include "feature_pairs.h"

#include "../core/simd.h"

namespace fastloss::inline FL_ISA {
namespace {

template <class T>
struct FeaturePairs {
  using R = acc_t<T>;
  using F = vector_t<R>;
  static constexpr int W = kLanes<F>;

  FL_FN static F get(const T* p, int64_t left) { return left >= W ? load(p) : load_part(p, left, R(0)); }
  FL_FN static void put(T* p, F v, int64_t left) { left >= W ? store(p, v) : store_part(p, v, left); }

  static void forward(const FeatureArgs& args, int64_t row) {
    const T *a = static_cast<const T*>(args.a) + row * args.n,
            *b = static_cast<const T*>(args.b) + row * args.n;
    F sums[kFeatureSums] = {};
    for (int64_t j = 0; j < args.n; j += W) {
      const int64_t left = args.n - j;
      const F x = get(a + j, left), y = get(b + j, left);
      F d = x - y + R(args.eps);
      if (left < W) d = select(first_lanes<F>(left), d, F{});
      sums[0] += x * y;
      sums[1] += x * x;
      sums[2] += y * y;
      sums[3] += d * d;
    }
    for (int k = 0; k < kFeatureSums; ++k)
      static_cast<R*>(args.sums)[k * args.rows + row] = horizontal_sum(sums[k]);
  }
  static void backward(const FeatureArgs& args, int64_t row) {
    const int64_t begin = row * args.n;
    const T *a = static_cast<const T*>(args.a) + begin, *b = static_cast<const T*>(args.b) + begin;
    T *da = static_cast<T*>(args.da) + begin, *db = static_cast<T*>(args.db) + begin;
    R g[kFeatureSums];
    for (int k = 0; k < kFeatureSums; ++k)
      g[k] = (k ? 2 : 1) * static_cast<const R*>(args.grad)[k * args.rows + row];
    for (int64_t j = 0; j < args.n; j += W) {
      const int64_t left = args.n - j;
      const F x = get(a + j, left), y = get(b + j, left), d = (x - y + R(args.eps)) * g[3];
      put(da + j, y * g[0] + x * g[1] + d, left);
      put(db + j, x * g[0] + y * g[2] - d, left);
    }
  }
  static void run(const FeatureArgs& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) args.sums ? forward(args, row) : backward(args, row);
  }
};

void run(const FeatureArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&]<class T> { FeaturePairs<T>::run(args, begin, end); });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

#define FASTLOSS_JOIN_(a, b) a##b
#define FASTLOSS_JOIN(a, b) FASTLOSS_JOIN_(a, b)

namespace fastloss::cpu {
const FeatureKernel FASTLOSS_JOIN(features_, FL_ISA) = &run;
}  // namespace fastloss::cpu
