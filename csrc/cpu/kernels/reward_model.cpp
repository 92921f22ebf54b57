// Losses of rankings for one instruction set: compiled once for each, with FL_ISA naming it. A vector holds
// the same item of as many rows as it has lanes.
#include "../../losses/reward_model.h"
#include "../../math/math.h"
#include "../scratch.h"
#include "reward_model.h"

namespace fastloss::inline FL_ISA {
namespace {

template <class F>
struct Rows {
  F *rewards, *ranks, *normalizers;
  FL_FN F reward(int64_t j) const { return rewards[j]; }
  FL_FN F rank(int64_t j) const { return ranks[j]; }
  FL_FN F normalizer(int64_t j) const { return normalizers[j]; }
};

template <class T>
class RankingKernel {
  using R = acc_t<T>;
  using F = vector_t<R>;
  static constexpr int W = kLanes<F>;

 public:
  explicit RankingKernel(const RankingArgs& args)
      : a_(args), n_(args.n), width_(args.state_width()), chooses_(args.kind == Ranking::plackett_luce) {
    char* p = static_cast<char*>(cpu::thread_scratch(3 * (n_ + 1) * sizeof(F) + 64));
    F* const first = reinterpret_cast<F*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
    rows_ = {first, first + n_, first + 2 * n_};
  }
  FL_FN void run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r += W) {
      lanes_ = end - r < W ? end - r : W;
      for (int64_t j = 0; j < n_; ++j)
        for (int64_t l = 0; l < W; ++l) {  // lanes without a row rank nothing
          const int64_t at = (r + l) * n_ + j;
          rows_.rewards[j][l] = l < lanes_ ? widen(static_cast<const T*>(a_.rewards)[at]) : R(0);
          rows_.ranks[j][l] = l < lanes_ ? static_cast<const R*>(a_.ranks)[at] : R(NAN);
          if (a_.backward && chooses_) rows_.normalizers[j][l] = l < lanes_ ? state(r + l)[j] : R(0);
        }
      if (a_.backward) {
        backward(r);
      } else {
        forward(r);
      }
    }
  }

 private:
  FL_NOINLINE void forward(int64_t r) {
    F value{}, pairs{};
    for (int64_t i = 0; i < n_; ++i) {
      const RankedItem<F> item = chooses_ ? choice_of_item<F>(rows_, n_, i) : pairs_of_item<F>(rows_, n_, i);
      value += item.value;
      pairs += item.pairs;
      if (chooses_)
        for (int64_t l = 0; l < lanes_; ++l) state(r + l)[i] = item.value[l];
    }
    const F weight = loss_weight(a_.kind, pairs);
    for (int64_t l = 0; l < lanes_; ++l) {
      static_cast<R*>(a_.loss)[r + l] = value[l] * weight[l];
      static_cast<R*>(a_.pairs)[r + l] = pairs[l];
      state(r + l)[width_ - 1] = pairs[l];
    }
  }
  FL_NOINLINE void backward(int64_t r) {
    F g{}, pairs{};
    for (int64_t l = 0; l < lanes_; ++l) {
      g[l] = static_cast<const R*>(a_.upstream)[r + l];
      pairs[l] = state(r + l)[width_ - 1];
    }
    g *= loss_weight(a_.kind, pairs);
    for (int64_t i = 0; i < n_; ++i) {
      const F d = chooses_ ? choice_gradient<F>(rows_, n_, i) : pairs_gradient<F>(rows_, n_, i);
      for (int64_t l = 0; l < lanes_; ++l)
        store_one(static_cast<T*>(a_.gradient) + (r + l) * n_ + i, g[l] * d[l]);
    }
  }

  FL_FN R* state(int64_t r) const { return static_cast<R*>(a_.state) + r * width_; }

  const RankingArgs& a_;
  const int64_t n_, width_;
  const bool chooses_;
  Rows<F> rows_;
  int64_t lanes_ = 0;
};

void run(const RankingArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T> { RankingKernel<T>(a).run(begin, end); });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
FASTLOSS_OF_ISA(RankingKernel, ranking_kernel) = &run;
}  // namespace fastloss::cpu
