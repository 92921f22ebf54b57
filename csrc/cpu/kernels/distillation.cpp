// Two rows of logits at a time, read from memory once: maxima and sums, then the divergence, then the
// gradients, with streaming stores if they are large. Between the sweeps the exponentials, and the
// log-ratios of a mixture, stay in scratch memory in the L2 cache. Rows are padded with logits of -infinity.
//
// Forward and backward make the same gradients, bit for bit: so the compiler must not contract to FMAs,
// which it might do in one of them only.
#pragma GCC optimize("fp-contract=off")
#include <cstring>

#include "../../math/online_softmax.h"
#include "../scratch.h"
#include "distillation.h"

namespace fastloss::inline FL_ISA {
namespace {

template <class T, int kKind>
class DivergenceKernel {
  using R = acc_t<T>;
  using F = vector_t<R>;
  static constexpr int W = kLanes<F>, kUnroll = 4;

 public:
  explicit DivergenceKernel(const DivergenceArgs& args)
      : a_(args.rows),
        dq_(static_cast<T*>(args.dq)),
        loss_(args.rows.hparams),
        n_(args.rows.n),
        scale_(R(args.rows.logit_scale)) {
    const int64_t padded = (n_ + W - 1) / W * W;
    R* p = static_cast<R*>(cpu::thread_scratch((kKind == kMixture ? 4 : 2) * padded * sizeof(R)));
    e_q_ = p;
    e_p_ = p + padded;
    u_ = p + 2 * padded;
    v_ = p + 3 * padded;
  }
  FL_FN void run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
    if (a_.past_cache) _mm_sfence();
  }

 private:
  struct Side {  // one of the two rows
    const T* x;
    R* e;  // exp(z - m)
    R m, sum, log_sum, inv_sum;

    FL_FN void set(R sum_) {
      sum = sum_;
      log_sum = log(sum);
      inv_sum = 1 / sum;
    }
  };

  FL_NOINLINE void row(int64_t r) {
    R* state = static_cast<R*>(a_.state) + r * kDivergenceState;
    const bool backward = a_.pass == RowPass::backward;
    T* dx = a_.dx ? static_cast<T*>(a_.dx) + r * n_ : nullptr;
    T* dq = dq_ ? dq_ + r * n_ : nullptr;
    R k = backward ? state[8] : a_.row_weight ? static_cast<const R*>(a_.row_weight)[r] : 1;
    if (k == 0) {
      if (!backward) {
        for (int64_t i = 0; i < kDivergenceState; ++i) state[i] = 0;
        static_cast<R*>(a_.loss)[r] = 0;
      }
      if (dx) std::memset(dx, 0, n_ * sizeof(T));
      if (dq) std::memset(dq, 0, n_ * sizeof(T));
      return;
    }
    Side student{static_cast<const T*>(a_.x) + a_.x_layout.start(r), e_q_, state[0], 0, 0, 0};
    Side teacher{static_cast<const T*>(a_.q) + a_.q_layout.start(r), e_p_, state[2], 0, 0, 0};
    R top_u = state[4], top_v = state[5], a = state[6], b = state[7], g = 1;
    if (backward) {
      student.set(state[1]);
      teacher.set(state[3]);
      g = static_cast<const R*>(a_.upstream)[r * a_.upstream_stride];
    } else {
      normalise(student);
      normalise(teacher);
      value(student, teacher, top_u, top_v, a, b);
      static_cast<R*>(a_.loss)[r] = k * loss_.loss(top_u + a, top_v + b);
      if (a_.norm) k /= *static_cast<const R*>(a_.norm);
      const R kept[kDivergenceState] = {student.m, student.sum, teacher.m, teacher.sum, top_u, top_v,
                                        a,         b,           k};
      std::memcpy(state, kept, sizeof kept);
    }
    g *= k * scale_;
    if (dx)
      gradient(student, teacher, dx, [&](F p, F q, F, F v) __attribute__((always_inline)) {
        return loss_.by_student(p, q, v, top_v, b, g);
      });
    if (dq)
      gradient(student, teacher, dq, [&](F p, F q, F u, F) __attribute__((always_inline)) {
        return loss_.by_teacher(p, q, u, top_u, a, g);
      });
  }

  FL_FN F logits(const T* x, int64_t j) const {
    return (j + W <= n_ ? load(x + j) : load_part(x + j, n_ - j, -R(INFINITY))) * scale_;
  }
  FL_NOINLINE void normalise(Side& s) const {
    F top[kUnroll], sum[kUnroll] = {};
    for (F& t : top) t = fill<F>(-INFINITY);
    int64_t j = 0;
    for (; j + kUnroll * W <= n_; j += kUnroll * W)
      for (int i = 0; i < kUnroll; ++i) top[i] = max(load(s.x + j + i * W) * scale_, top[i]);
    for (; j < n_; j += W) top[0] = max(logits(s.x, j), top[0]);
    const R m = horizontal_max(max(max(top[0], top[1]), max(top[2], top[3])));
    s.m = softmax_base(m);
    const auto add = [&](int64_t at, F z, F& to) __attribute__((always_inline)) {
      const F e = exp_down(z - s.m);
      to += e;
      store(s.e + at, e);
    };
    for (j = 0; j + kUnroll * W <= n_; j += kUnroll * W)
      for (int i = 0; i < kUnroll; ++i) add(j + i * W, load(s.x + j + i * W) * scale_, sum[i]);
    for (; j < n_; j += W) add(j, logits(s.x, j), sum[0]);
    s.set(horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
  FL_FN auto log_ratios(const Side& student, const Side& teacher, int64_t j) const {
    return loss_.log_ratios(logits(student.x, j) - student.m, logits(teacher.x, j) - teacher.m,
                            teacher.log_sum - student.log_sum);
  }
  // The same in later sweeps; of a mixture they are kept from the first.
  FL_FN auto kept_ratios(const Side& student, const Side& teacher, int64_t j) const {
    if constexpr (kKind == kMixture) {
      return decltype(log_ratios(student, teacher, j)){load(u_ + j), load(v_ + j)};
    } else {
      return log_ratios(student, teacher, j);
    }
  }
  // First the log-ratios at the most probable classes, whose e is 1, then the sums relative to them. A row
  // without a class that has more than half of the probability needs no such care; the logarithms of a mixture
  // are computed in the first sweep anyway.
  FL_NOINLINE void value(const Side& student, const Side& teacher, R& top_u, R& top_v, R& a, R& b) const {
    F u = fill<F>(-INFINITY), v = u;
    const bool one_class = (kKind != kReverse && teacher.sum < 2) || (kKind != kForward && student.sum < 2);
    const int64_t searched = kKind == kMixture || one_class ? n_ : 0;
    for (int64_t j = 0; j < searched; j += W) {
      const auto s = log_ratios(student, teacher, j);
      if constexpr (kKind != kReverse) u = select(load(teacher.e + j) == 1, max(s.u, u), u);
      if constexpr (kKind != kForward) v = select(load(student.e + j) == 1, max(s.v, v), v);
      if constexpr (kKind == kMixture) {
        store(u_ + j, s.u);
        store(v_ + j, s.v);
      }
    }
    top_u = loss_.finite(horizontal_max(u));
    top_v = loss_.finite(horizontal_max(v));
    F sum_a[kUnroll] = {}, sum_b[kUnroll] = {};
    for (int64_t j = 0, i = 0; j < n_; j += W, i = (i + 1) % kUnroll) {
      const auto s = kept_ratios(student, teacher, j);
      if constexpr (kKind != kReverse)
        sum_a[i] += loss_.weighed(load(teacher.e + j) * teacher.inv_sum, s.u - top_u);
      if constexpr (kKind != kForward)
        sum_b[i] += loss_.weighed(load(student.e + j) * student.inv_sum, s.v - top_v);
    }
    a = horizontal_sum((sum_a[0] + sum_a[1]) + (sum_a[2] + sum_a[3]));
    b = horizontal_sum((sum_b[0] + sum_b[1]) + (sum_b[2] + sum_b[3]));
  }
  template <class Slope>
  FL_FN void gradient(const Side& student, const Side& teacher, T* out, Slope slope) const {
    const bool kept = a_.pass == RowPass::forward_gradient;
    const auto at = [&](int64_t j) __attribute__((always_inline)) {
      const F e_p = kept ? load(teacher.e + j) : exp_down(logits(teacher.x, j) - teacher.m);
      const F e_q = kept ? load(student.e + j) : exp_down(logits(student.x, j) - student.m);
      const F p = e_p * teacher.inv_sum, q = e_q * student.inv_sum;
      const auto s = kept ? kept_ratios(student, teacher, j) : log_ratios(student, teacher, j);
      return slope(p, q, s.u, s.v);
    };
    int64_t j = 0;
    if (a_.past_cache && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
      for (; j + W <= n_; j += W) stream(out + j, at(j));
    } else {
      for (; j + W <= n_; j += W) store(out + j, at(j));
    }
    if (j < n_) store_part(out + j, at(j), n_ - j);
  }

  const RowArgs& a_;
  T* const dq_;
  const LogitDivergence<R, kKind> loss_;
  const int64_t n_;
  const R scale_;
  R *e_q_, *e_p_, *u_, *v_;
};

template <class T>
void run_type(const DivergenceArgs& a, int64_t begin, int64_t end) {
  switch (a.rows.variant) {
    case kForward:
      return DivergenceKernel<T, kForward>(a).run(begin, end);
    case kReverse:
      return DivergenceKernel<T, kReverse>(a).run(begin, end);
    default:
      return DivergenceKernel<T, kMixture>(a).run(begin, end);
  }
}
void run(const DivergenceArgs& a, int64_t begin, int64_t end) {
  with_type(a.rows.dtype, [&]<class T> { run_type<T>(a, begin, end); });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
FASTLOSS_OF_ISA(DivergenceKernel, divergence_kernel) = &run;
}  // namespace fastloss::cpu
