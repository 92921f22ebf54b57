// Sums over pairs and triples of rows (losses/feature_sums.h) for one instruction set: compiled once for
// each, with FL_ISA naming it.
#include "feature_sums.h"

#include "../../losses/feature_sums.h"
#include "../../math/math.h"

namespace fastloss::inline FL_ISA {
namespace {

template <class T, int kOthers>
struct FeaturePairs {
  using R = acc_t<T>;
  using F = vector_t<R>;
  static constexpr int W = kLanes<F>;

  FL_FN static F get(const T* p, int64_t left) { return left >= W ? load(p) : load_part(p, left, R(0)); }
  FL_FN static void put(T* p, F v, int64_t left, bool past_cache) {
    if (left < W) return store_part(p, v, left);
    past_cache ? stream(p, v) : store(p, v);
  }

  static void forward(const FeatureArgs& args, int64_t row) {
    const T* a = static_cast<const T*>(args.a) + row * args.n;
    const T* b[kOthers];
    for (int o = 0; o < kOthers; ++o) b[o] = static_cast<const T*>(args.other[o]) + row * args.n;
    F sums[kOthers][kFeatureSums] = {};
    for (int64_t j = 0; j < args.n; j += W) {
      const int64_t left = args.n - j;
      const F x = get(a + j, left);
      for (int o = 0; o < kOthers; ++o) {
        const F y = get(b[o] + j, left);
        F d = x - y + R(args.eps);
        if (left < W) d = select(first_lanes<F>(left), d, F{});
        add_feature(sums[o], x, y, d);
      }
    }
    R* const out = static_cast<R*>(args.sums) + row;
    for (int o = 0; o < kOthers; ++o)
      for (int k = 0; k < kFeatureSums; ++k)
        out[(o * kFeatureSums + k) * args.rows] = horizontal_sum(sums[o][k]);
  }
  static void backward(const FeatureArgs& args, int64_t row, bool past_cache) {
    const int64_t begin = row * args.n;
    const T* a = static_cast<const T*>(args.a) + begin;
    T* da = static_cast<T*>(args.da) + begin;
    const R* const grad = static_cast<const R*>(args.grad) + row;
    const T* b[kOthers];
    T* db[kOthers];
    FeatureGradient<R> g[kOthers];
    R of_a = 0;
    for (int o = 0; o < kOthers; ++o) {
      b[o] = static_cast<const T*>(args.other[o]) + begin;
      db[o] = static_cast<T*>(args.d_other[o]) + begin;
      g[o] = {grad + o * kFeatureSums * args.rows, args.rows};
      of_a += g[o].aa;
    }
    for (int64_t j = 0; j < args.n; j += W) {
      const int64_t left = args.n - j;
      const F x = get(a + j, left);
      F dx = scaled(of_a, x);
      for (int o = 0; o < kOthers; ++o) {
        const F y = get(b[o] + j, left);
        put(db[o] + j, g[o].by_other(x, y, x - y + R(args.eps), dx), left, past_cache);
      }
      put(da + j, dx, left, past_cache);
    }
  }
  static void run(const FeatureArgs& args, int64_t begin, int64_t end) {
    if (args.sums) {
      for (int64_t row = begin; row < end; ++row) forward(args, row);
      return;
    }
    uintptr_t places = reinterpret_cast<uintptr_t>(args.da) | args.n * sizeof(T);
    for (int o = 0; o < kOthers; ++o) places |= reinterpret_cast<uintptr_t>(args.d_other[o]);
    const bool lines = args.past_cache && places % 64 == 0;
    for (int64_t row = begin; row < end; ++row) backward(args, row, lines);
    if (lines) _mm_sfence();
  }
};

void run(const FeatureArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&]<class T> {
    args.others == 1 ? FeaturePairs<T, 1>::run(args, begin, end) : FeaturePairs<T, 2>::run(args, begin, end);
  });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
FASTLOSS_OF_ISA(FeatureKernel, feature_kernel) = &run;
}  // namespace fastloss::cpu
