// Reductions of losses of samples for one instruction set: compiled once for each, with FL_ISA naming it.
#include "aggregation.h"

#include "../../losses/aggregation.h"
#include "../../math/math.h"

namespace fastloss::inline FL_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // samples that are summed in R; the sums of blocks are added in double

struct Widen {
  template <class T>
  double operator()(T x) const {
    return widen(x);
  }
};

// The sum of the lanes, pairwise, in double.
template <class F>
FL_FN double sum_as_double(F v) {
  constexpr int W = kLanes<F>;
  scalar_t<F> lane[W];
  std::memcpy(lane, &v, sizeof v);
  double part[W];
  for (int k = 0; k < W; ++k) part[k] = lane[k];
  for (int width = W / 2; width; width /= 2)
    for (int k = 0; k < width; ++k) part[k] += part[k + width];
  return part[0];
}

template <class T>
class AggregateKernel {
  using R = acc_t<T>;
  using F = vector_t<R>;
  static constexpr int W = kLanes<F>;

 public:
  explicit AggregateKernel(const AggregateArgs& args)
      : a_(args), x_(static_cast<const T*>(args.losses)), w_(static_cast<const R*>(args.weight)) {}

  template <class Pass>
  FL_NOINLINE void sum(int64_t begin, int64_t end) const {
    for (int64_t part = begin; part < end; ++part) {
      double sums[Pass::kSums] = {}, tops[kMaxTops] = {-INFINITY, -INFINITY};
      const int64_t first = part * cpu::kAggregatePart,
                    last = first + cpu::kAggregatePart < a_.n ? first + cpu::kAggregatePart : a_.n;
      for (int64_t i = first; i < last; i += kBlock)
        block<Pass>(i, i + kBlock < last ? i + kBlock : last, sums, tops);
      for (int k = 0; k < Pass::kSums; ++k) a_.partial[k * a_.partials + part] = sums[k];
      for (int k = 0; k < Pass::kTops; ++k) a_.partial[(kMaxSums + k) * a_.partials + part] = tops[k];
    }
  }

  template <class Pass>
  FL_NOINLINE void finish() const {
    double sums[Pass::kSums] = {}, tops[kMaxTops] = {-INFINITY, -INFINITY};
    for (int k = 0; k < Pass::kSums; ++k)
      for (int64_t p = 0; p < a_.partials; ++p) sums[k] += a_.partial[k * a_.partials + p];
    for (int k = 0; k < Pass::kTops; ++k)
      for (int64_t p = 0; p < a_.partials; ++p)
        tops[k] = max(a_.partial[(kMaxSums + k) * a_.partials + p], tops[k]);
    Pass::template finish<T>(a_, sums, tops, *a_.state, Widen{});
  }

  FL_NOINLINE void gradient(int64_t begin, int64_t end) const {
    const R upstream = *static_cast<const R*>(a_.upstream);
    if (begin == 0 && a_.theta_gradient)
      *static_cast<R*>(a_.theta_gradient) = R(a_.state->theta_slope * upstream);
    const AggregateGradient<R> slope(a_, *a_.state, upstream);
    T* const dx = static_cast<T*>(a_.gradient);
    const int64_t last = end * cpu::kAggregatePart < a_.n ? end * cpu::kAggregatePart : a_.n;
    for (int64_t i = begin * cpu::kAggregatePart; i < last; i += W) {
      const int64_t count = last - i < W ? last - i : W;
      const F w = count < W ? weight<false>(i, count) : weight<true>(i, W);
      const F g = slope(count < W ? load_part(x_ + i, count, R(0)) : load(x_ + i)) * w;
      const F d = select(w != 0, g, F{});
      if (count < W) {
        store_part(dx + i, d, count);
      } else {
        store(dx + i, d);
      }
    }
  }

 private:
  template <bool kWhole>
  FL_FN F weight(int64_t i, int64_t count) const {
    if constexpr (kWhole) return w_ ? load(w_ + i) : fill<F>(1);
    return w_ ? load_part(w_ + i, count, R(0)) : select(first_lanes<F>(count), fill<F>(1), F{});
  }

  template <class Pass>
  FL_FN void block(int64_t begin, int64_t end, double* sums, double* tops) const {
    const Pass pass(a_, *a_.state);
    F s[Pass::kSums] = {}, top[kMaxTops] = {fill<F>(-INFINITY), fill<F>(-INFINITY)};
    int64_t i = begin;
    for (; i + W <= end; i += W) {
      F x = load(x_ + i), w = fill<F>(1);
      if (w_) {
        w = load(w_ + i);
        x = select(w != 0, x, F{});
      }
      pass.add(x, w, s, top);
    }
    if (i < end) {
      const F w = weight<false>(i, end - i);
      pass.add(select(w != 0, load_part(x_ + i, end - i, R(0)), F{}), w, s, top);
    }
    for (int k = 0; k < Pass::kSums; ++k) sums[k] += sum_as_double(s[k]);
    for (int k = 0; k < Pass::kTops; ++k) tops[k] = max(double(horizontal_max(top[k])), tops[k]);
  }

  const AggregateArgs& a_;
  const T* x_;
  const R* w_;
};

void sum(const AggregateArgs& a, AggregatePass pass, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T> {
    with_pass<acc_t<T>>(pass, [&]<class Pass> { AggregateKernel<T>(a).template sum<Pass>(begin, end); });
  });
}
void finish(const AggregateArgs& a, AggregatePass pass) {
  with_type(a.dtype, [&]<class T> {
    with_pass<acc_t<T>>(pass, [&]<class Pass> { AggregateKernel<T>(a).template finish<Pass>(); });
  });
}
void gradient(const AggregateArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T> { AggregateKernel<T>(a).gradient(begin, end); });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
FASTLOSS_OF_ISA(AggregateKernels, aggregate_kernels) = {&sum, &finish, &gradient};
}  // namespace fastloss::cpu
