// One row as cpu/kernels/rows.h walks it: its inputs, and what only some losses have beside the sums and the
// gradient of all classes. A loss with planes has the log-probabilities of the classes asked for, a loss with
// numbers the term of losses/number_token.h.
#pragma once
#include "../../drivers/row_loss.h"
#include "../../drivers/rows.h"
#include "../../losses/number_token.h"
#include "../../math/online_softmax.h"

namespace fastloss::inline FL_ISA {

template <class Loss, class T>
class RowBase {
 protected:
  using R = acc_t<T>;
  using F = vector_t<R>;
  using GradCoef = typename Loss::GradCoef;
  static constexpr int W = kLanes<F>, kUnroll = 4;

  FL_FN RowBase(const RowArgs& args, const Loss& loss)
      : a_(args),
        loss_(loss),
        n_(args.n),
        scale_(R(args.logit_scale)),
        cap_(R(args.softcap)),
        inverse_cap_(R(1 / args.softcap)) {}

  struct Row {  // what the passes over one row share
    const T* x;
    const T* q;
    int64_t t;
    RowState<R> state;
    Target<R> target;
    NumberTerm<R> number;
  };

  // ---- one row's inputs
  FL_FN R row_weight(int64_t r, int64_t t) const {
    if (a_.target && t == a_.ignore_index) return 0;
    return a_.row_weight ? static_cast<const R*>(a_.row_weight)[r] : 1;
  }
  FL_FN R class_weight(int64_t j) const {
    return a_.class_weight ? static_cast<const R*>(a_.class_weight)[j] : 1;
  }
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
  FL_FN F slope(F x) const {  // dz / dx; from x, since in z / cap two more roundings would be
    if constexpr (Loss::kSoftcap)
      if (cap_ > 0) {
        const F t = tanh(x * scale_ * inverse_cap_);
        return scale_ * ((1 - t) * (1 + t));
      }
    return fill<F>(scale_);
  }
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

  // z - base of a rounded z: exactly 0 at the maximum
  FL_FN F below(F x, R base) const { return rounded(logit(x)) - base; }
  // exp, to the precision of T where no more is asked for.
  template <int N>
  FL_FN static void powers(const F (&d)[N], F (&e)[N]) {
    if constexpr (sizeof(T) == 2 && !Loss::kPlanes) {
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
  FL_NOINLINE R block_max(const T* x, int64_t begin, int64_t end) const {
    if constexpr (sizeof(T) == 2)
      if (scale_ > 0 && !(Loss::kSoftcap && cap_ > 0))
        return widen(max_half(x + begin, end - begin)) * scale_;
    F top[kUnroll];
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

  // Follows the running maximum into a block. -infinity: nothing but -infinity so far.
  FL_FN static bool raise(R& base, R top) {
    if (!(top > base)) return false;
    base = top;
    return true;
  }

  // ---- results of a loss with planes
  FL_FN Planes<R> results(int64_t r) const { return {static_cast<R*>(a_.loss) + r, a_.rows}; }
  FL_FN Planes<const R> upstream(int64_t r) const {
    return {static_cast<const R*>(a_.upstream) + r, a_.rows};
  }
  FL_FN const int64_t* asked(int64_t r) const { return a_.asked + r * a_.asked_each; }
  FL_FN R asked_logit(const Row& row, int64_t j) const { return logit(fill<F>(widen(row.x[j])))[0]; }
  FL_NOINLINE void write_asked(const Row& row, int64_t r) const {
    const Planes<R> out = results(r);
    for (int64_t i = 0, count = a_.asked_each; i < count; ++i) {
      const R d = asked_logit(row, asked(r)[i]) - row.state.m;
      out[Loss::kPlanes + i] = d - row.state.log_sum;
      out[Loss::kPlanes + count + i] = d == 0;
    }
  }
  FL_NOINLINE void asked_gradient(const Row& row, int64_t r, T* dx) const {
    const auto coef = loss_.grad_coef(row.state, upstream(r), a_.asked_each, scale_);
    for (int64_t i = 0, count = a_.asked_each; i < count; ++i) {
      const int64_t j = asked(r)[i];
      R g = 0;  // a class may be asked for more than once
      for (int64_t other = 0; other < count; ++other)
        if (asked(r)[other] == j) g += upstream(r)[Loss::kPlanes + other];
      const R z = asked_logit(row, j), d = z - row.state.m;
      const R dz = loss_.asked_for(exp(d - row.state.log_sum), d, g * scale_, coef);
      store_one(dx + j, dz * (slope(fill<F>(widen(row.x[j])))[0] / scale_));
    }
  }

  // ---- the term of a loss with numbers
  FL_FN const R* distances_of_label(int64_t r) const {
    return static_cast<const R*>(a_.number_table) + a_.number_position[r] * a_.numbers;
  }
  FL_FN F distances_part(const R* distance, int64_t k) const {
    return k + W <= a_.numbers ? load(distance + k) : load_part(distance + k, a_.numbers - k, R(0));
  }
  FL_NOINLINE R number_term(Row& row, int64_t r) const {
    const R weight = static_cast<const R*>(a_.number_weight)[r];
    if (weight == 0) return 0;
    const int64_t count = a_.numbers;
    const R* distance = distances_of_label(r);
    R top = -INFINITY;
    for (int64_t k = 0; k < count; ++k) {
      number_logits_[k] = logit(fill<F>(widen(row.x[a_.number_ids[k]])))[0];
      top = max(number_logits_[k], top);
    }
    for (int64_t k = count; k % W; ++k) number_logits_[k] = -INFINITY;
    const R base = softmax_base(top);
    F total{}, weighted_distance{};
    for (int64_t k = 0; k < count; k += W) {
      const F e = exp(load(number_logits_ + k) - base);
      total += e;
      weighted_distance += e * distances_part(distance, k);
    }
    const R sum = horizontal_sum(total);
    row.number = loss_.numbers.term(weight, *static_cast<const R*>(a_.number_worst),
                                    horizontal_sum(weighted_distance) / sum, base, sum, row.state.m,
                                    row.state.log_sum);
    return row.number.value;
  }
  // Over the gradient of the number tokens' classes, which `coef` knows without their own share.
  template <class GradCoef>
  FL_NOINLINE void number_gradient(const Row& row, int64_t r, T* dx, const GradCoef& coef, R g,
                                   R at_target) const {
    const int64_t count = a_.numbers, *ids = a_.number_ids;
    const R* distance = distances_of_label(r);
    for (int64_t k = 0; k < count; k += W) {
      const F z = load(number_logits_ + k), p = exp((z - row.state.m) - row.state.log_sum);
      store(number_shared_ + k, loss_.grad(p, F{}, F{}, F{}, coef));
      store(number_self_ + k,
            loss_.numbers.self_term(row.number, exp(z - row.number.top), p, distances_part(distance, k)) * g);
    }
    for (int64_t k = 0; k < count;) {
      const int64_t j = ids[k];
      R dz = j == row.t ? at_target : number_shared_[k];
      for (; k < count && ids[k] == j; ++k) dz += number_self_[k];  // a class may stand there more than once
      store_one(dx + j, dz);
    }
  }

  const RowArgs& a_;
  const Loss loss_;
  const int64_t n_;
  const R scale_, cap_, inverse_cap_;
  R *number_logits_, *number_shared_, *number_self_;  // of the number tokens: logits, gradients
};

}  // namespace fastloss::inline FL_ISA
