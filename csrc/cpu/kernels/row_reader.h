// One row of logits as the CPU kernels read it: its inputs, logits relative to the running maximum, and the
// maximum of a block.
#pragma once
#include "../../drivers/row_loss.h"
#include "../../drivers/rows.h"
#include "../../losses/number_token.h"
#include "../../math/online_softmax.h"

namespace fastloss::inline FL_ISA {

template <class Loss, class T>
class RowReader {
 protected:
  using R = acc_t<T>;
  using F = vector_t<R>;
  using GradCoef = typename Loss::GradCoef;
  static constexpr int W = kLanes<F>, kUnroll = 4;

  FL_FN RowReader(const RowArgs& args, const Loss& loss)
      : a_(args),
        loss_(loss),
        n_(args.n),
        scale_(R(args.logit_scale)),
        cap_(R(args.softcap)),
        inverse_cap_(R(1 / args.softcap)) {}

  // What the sweeps over one row share.
  struct Row {
    const T* x;  // logits, contiguous
    const T* q;  // soft targets, contiguous, or null
    int64_t t;   // target class, -1 if there is none
    RowState<R> state;
    Target<R> target;
    NumberTerm<R> number;  // of a loss with kNumberTokens
  };

  FL_FN R row_weight(int64_t r, int64_t t) const {
    if (a_.target && t == a_.ignore_index) return 0;
    if (a_.target && a_.class_weight && loss_.weighed_by_class() && class_weight(t) == 0 && norm() != 0)
      return 0;
    return a_.row_weight ? static_cast<const R*>(a_.row_weight)[r] : 1;
  }
  FL_FN R norm() const { return a_.norm ? *static_cast<const R*>(a_.norm) : 1; }
  FL_FN R class_weight(int64_t j) const {
    return a_.class_weight ? static_cast<const R*>(a_.class_weight)[j] : 1;
  }
  // Row r where it lies, or its copy in `staged` if its classes are strided.
  FL_FN const T* contiguous(const T* base, const RowLayout& layout, int64_t r, T* staged) const {
    const T* p = base + layout.start(r);
    if (layout.class_stride == 1) return p;
    for (int64_t j = 0; j < n_; ++j) staged[j] = p[j * layout.class_stride];
    return staged;
  }
  FL_FN F logit(F x) const {
    F z = x * scale_;
    if constexpr (Loss::kSoftcap)
      if (cap_ > 0) z = cap_ * tanh(z * inverse_cap_);
    return z;
  }
  FL_FN R logit_of_class(const Row& row, int64_t j) const { return logit(fill<F>(widen(row.x[j])))[0]; }
  // dz / dx, computed from x: from z / cap it would carry two more roundings.
  FL_FN F slope(F x) const {
    if constexpr (Loss::kSoftcap)
      if (cap_ > 0) {
        const F t = tanh(x * scale_ * inverse_cap_);
        return scale_ * ((1 - t) * (1 + t));
      }
    return fill<F>(scale_);
  }

  // Class weights w and soft targets q of the classes of one vector; unused unless Loss::kSideStreams.
  struct Side {
    F w, q;
  };
  FL_FN Side side(const Row& row, int64_t j) const {
    if constexpr (!Loss::kSideStreams) return Side{};
    return Side{a_.class_weight ? load(static_cast<const R*>(a_.class_weight) + j) : fill<F>(1),
                row.q ? load(row.q + j) : F{}};
  }
  FL_FN Side side_part(const Row& row, int64_t j, int64_t count) const {
    if constexpr (!Loss::kSideStreams) return Side{};
    return Side{
        a_.class_weight ? load_part(static_cast<const R*>(a_.class_weight) + j, count, R(0)) : fill<F>(1),
        row.q ? load_part(row.q + j, count, R(0)) : F{}};
  }

  // z - base. z is rounded first, so that the difference is exactly 0 at the maximum.
  FL_FN F below(F x, R base) const { return rounded(logit(x)) - base; }
  // exp, only as accurate as T needs. Log-probabilities (kOutputs) take the full precision of R.
  template <int N>
  FL_FN static void powers(const F (&d)[N], F (&e)[N]) {
    if constexpr (sizeof(T) == 2 && !Loss::kOutputs) {
      exp_for_half(d, e);
    } else {
      exp_down(d, e);
    }
  }
  FL_FN static F power(F d) {
    const F ds[1] = {d};
    F e[1];
    powers(ds, e);
    return e[0];
  }

  // The maximum logit of a block. Uncapped half-precision logits are compared by their bit patterns.
  FL_NOINLINE R block_max(const T* x, int64_t begin, int64_t end) const {
    if constexpr (sizeof(T) == 2)
      if (scale_ > 0 && !(Loss::kSoftcap && cap_ > 0))
        return widen(max_half(x + begin, end - begin)) * scale_;
    F top[kUnroll];  // independent accumulators; the tail joins top[1]
    for (F& v : top) v = fill<F>(-INFINITY);
    int64_t j = begin;
    for (; j + kUnroll * W <= end; j += kUnroll * W)
      for (int u = 0; u < kUnroll; ++u) top[u] = max(logit(load(x + j + u * W)), top[u]);
    for (; j + W <= end; j += W) top[0] = max(logit(load(x + j)), top[0]);
    if (j < end) {
      const F z = logit(load_part(x + j, end - j, R(0)));
      top[1] = max(select(first_lanes<F>(end - j), z, top[1]), top[1]);
    }
    return horizontal_max(max(max(top[0], top[1]), max(top[2], top[3])));
  }
  // Moves the running maximum on to that of a block; whether it rose. -infinity: only -infinity so far.
  FL_FN static bool raise(R& base, R top) {
    if (!(top > base)) return false;
    base = top;
    return true;
  }

  const RowArgs& a_;
  const Loss loss_;
  const int64_t n_;
  const R scale_, cap_, inverse_cap_;
};

}  // namespace fastloss::inline FL_ISA
