// How a CPU walks rows of logits: one sweep over memory for value and gradient.
//
// A row is taken in blocks that fit in the first-level cache. Each block is searched for its maximum, then
// summed against the running maximum while the next block is prefetched; for the gradient the exponentials go
// to a scratch row that stays in the second-level cache, from where they are scaled and written out, past the
// caches when the output is larger than these. Nothing but that scratch row is stored between. The backward
// pass repeats the same arithmetic from the saved statistics, so both ways give the same bits.
#pragma once
#include "../core/row_loss.h"
#include "../core/rows.h"
#include "../core/simd.h"
#include "../losses/number_token.h"
#include "scratch.h"

namespace fastloss::inline FL_ISA {

template <class Loss, class T>
class RowWalker {
  using R = acc_t<T>;
  using F = vector_t<R>;
  using Lane = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  using Sums = typename Loss::template Sums<F>;
  static constexpr int W = kLanes<F>, kUnroll = 4, kStateHead = 3;  // state: m, log_sum, k, saved...
  static constexpr int64_t kBlock = 32768 / sizeof(R);
  static constexpr int kFields = std::is_empty_v<Sums> ? 0 : sizeof(Sums) / sizeof(F);

 public:
  FL_FN RowWalker(const RowArgs& args, const Loss& loss)
      : a_(args),
        loss_(loss),
        n_(args.n),
        scale_(R(args.logit_scale)),
        cap_(R(args.softcap)),
        inverse_cap_(R(1 / args.softcap)) {
    const int64_t blocks = (n_ + kBlock - 1) / kBlock, padded = (n_ + 2 * W) / W * W;
    const int64_t exps = args.pass == RowPass::forward_gradient ? padded * sizeof(R) : 0;
    const int64_t staged = padded * sizeof(T), numbers = (args.numbers + W - 1) / W * W * sizeof(R);
    char* p =
        static_cast<char*>(cpu::thread_scratch(exps + blocks * sizeof(R) + 3 * staged + 3 * numbers + 64));
    exps_ = reinterpret_cast<R*>(p);
    staged_x_ = reinterpret_cast<T*>(p + exps);
    staged_q_ = reinterpret_cast<T*>(p + exps + staged);
    staged_dx_ = reinterpret_cast<T*>(p + exps + 2 * staged);
    bases_ = reinterpret_cast<R*>(p + exps + 3 * staged);
    number_logits_ = bases_ + blocks;
    number_shared_ = number_logits_ + numbers / sizeof(R);
    number_own_ = number_shared_ + numbers / sizeof(R);
  }

  FL_FN void run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
    if (a_.past_cache) _mm_sfence();
  }

 private:
  struct Accumulator {
    F s{};
    [[no_unique_address]] Sums extra{};
  };
  struct Row {  // what the passes over one row share
    const T* x;
    const T* q;
    int64_t t;
    RowState<R> state;
    Target<R> target;
    NumberTerm<R> number;
  };

  FL_NOINLINE void row(int64_t r) {
    R* state = static_cast<R*>(a_.state) + r * a_.state_width;
    Row row{};
    row.t = a_.target ? a_.target[r] : -1;
    T* dx = a_.dx ? static_cast<T*>(a_.dx) + a_.dx_layout.start(r) : nullptr;
    R k = a_.pass == RowPass::backward ? state[2] : row_weight(r, row.t);
    if (k == 0) {
      if (a_.pass != RowPass::backward) {
        for (int64_t i = 0; i < a_.state_width; ++i) state[i] = 0;
        if constexpr (Loss::kPlanes) {
          for (int64_t i = 0; i < a_.planes; ++i) results(r)[i] = 0;
        } else {
          static_cast<R*>(a_.loss)[r] = 0;
        }
      }
      if (dx) write_zeros(dx);
      return;
    }
    row.x = contiguous(static_cast<const T*>(a_.x), a_.x_layout, r, staged_x_);
    row.q = a_.q ? contiguous(static_cast<const T*>(a_.q), a_.q_layout, r, staged_q_) : nullptr;
    row.target.hard = a_.target;
    row.target.weight = a_.target ? class_weight(row.t) : 1;
    const R zt = a_.target ? logit(fill<F>(widen(row.x[row.t])))[0] : 0;
    R g = 1;
    if (a_.pass == RowPass::backward) {
      row.state.m = state[0];
      row.state.log_sum = state[1];
      for (int i = 0; i < Loss::kSaved; ++i) row.state.saved[i] = state[kStateHead + i];
      row.target.d = zt - row.state.m;
      if constexpr (!Loss::kPlanes) g = static_cast<const R*>(a_.upstream)[r * a_.upstream_stride];
      if constexpr (Loss::kNumbers) number_term(row, r);
    } else {
      if constexpr (Loss::kPlanes) {
        accumulate(row, zt);
        loss_.write(row.state, results(r));
        write_asked(row, r);
      } else {
        R value = accumulate(row, zt);
        if constexpr (Loss::kNumbers) value += number_term(row, r);
        static_cast<R*>(a_.loss)[r] = k * value;
      }
      if (a_.norm) k /= *static_cast<const R*>(a_.norm);
      state[0] = row.state.m;
      state[1] = row.state.log_sum;
      state[2] = k;
      for (int i = 0; i < a_.state_width - kStateHead; ++i)
        state[kStateHead + i] = i < Loss::kSaved ? row.state.saved[i] : 0;
    }
    if (!dx) return;
    T* out = a_.dx_layout.class_stride == 1 ? dx : staged_dx_;
    gradient(row, r, out, g * k);
    if constexpr (Loss::kPlanes) asked_gradient(row, r, out);
    if (out != dx)
      for (int64_t j = 0; j < n_; ++j) dx[j * a_.dx_layout.class_stride] = out[j];
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
    const auto coef = loss_.coef(row.state, upstream(r), a_.asked_each, scale_);
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
  FL_FN const R* number_far(int64_t r) const {
    return static_cast<const R*>(a_.number_table) + a_.number_position[r] * a_.numbers;
  }
  FL_FN F far_part(const R* far, int64_t k) const {
    return k + W <= a_.numbers ? load(far + k) : load_part(far + k, a_.numbers - k, R(0));
  }
  FL_NOINLINE R number_term(Row& row, int64_t r) const {
    const R weight = static_cast<const R*>(a_.number_weight)[r];
    if (weight == 0) return 0;
    const int64_t count = a_.numbers;
    const R* far = number_far(r);
    R top = -INFINITY;
    for (int64_t k = 0; k < count; ++k) {
      number_logits_[k] = logit(fill<F>(widen(row.x[a_.number_ids[k]])))[0];
      top = max(number_logits_[k], top);
    }
    for (int64_t k = count; k % W; ++k) number_logits_[k] = -INFINITY;
    const R base = finite(top);
    F total{}, away{};
    for (int64_t k = 0; k < count; k += W) {
      const F e = exp(load(number_logits_ + k) - base);
      total += e;
      away += e * far_part(far, k);
    }
    const R sum = horizontal_sum(total);
    row.number = loss_.numbers.term(weight, *static_cast<const R*>(a_.number_worst),
                                    horizontal_sum(away) / sum, base, sum, row.state.m, row.state.log_sum);
    return row.number.value;
  }
  // Over the gradient of the number tokens' classes, which `coef` knows without their own share.
  template <class Coef>
  FL_NOINLINE void number_gradient(const Row& row, int64_t r, T* dx, const Coef& coef, R g,
                                   R at_target) const {
    const int64_t count = a_.numbers, *ids = a_.number_ids;
    const R* far = number_far(r);
    for (int64_t k = 0; k < count; k += W) {
      const F z = load(number_logits_ + k), p = exp((z - row.state.m) - row.state.log_sum);
      store(number_shared_ + k, loss_.grad(p, F{}, F{}, F{}, coef));
      store(number_own_ + k, loss_.numbers.own(row.number, exp(z - row.number.top), p, far_part(far, k)) * g);
    }
    for (int64_t k = 0; k < count;) {
      const int64_t j = ids[k];
      R dz = j == row.t ? at_target : number_shared_[k];
      for (; k < count && ids[k] == j; ++k) dz += number_own_[k];  // a class may stand there more than once
      store_one(dx + j, dz);
    }
  }

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

  // ---- statistics
  // exp, to the precision of T where no more is asked for.
  FL_FN static F power(F d) {
    if constexpr (sizeof(T) == 2 && !Loss::kPlanes) {
      return exp_for_half(d);
    } else {
      return exp_down(d);
    }
  }
  FL_NOINLINE R block_max(const T* x, int64_t begin, int64_t end) const {
    if constexpr (sizeof(T) == 2)
      if (scale_ > 0 && !(Loss::kSoftcap && cap_ > 0)) return widen(largest(x + begin, end - begin)) * scale_;
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

  template <bool kKeep>
  FL_FN void add(const Row& row, int64_t j, R base, Accumulator& acc) {
    const F d = logit(load(row.x + j)) - base, e = power(d);
    const Side s = side(row, j);
    acc.s += e;
    acc.extra.add(e, d, s.w, s.q, loss_);
    if constexpr (kKeep) store(exps_ + j, e);
  }
  // `count` elements from j on, the target's among them perhaps: its exponential does not count
  template <bool kKeep>
  FL_NOINLINE void add_part(const Row& row, int64_t j, int64_t count, R base, Accumulator& acc) {
    const F x = count < W ? load_part(row.x + j, count, R(0)) : load(row.x + j);
    const F d = logit(x) - base;
    const auto here = first_lanes<F>(count);
    const auto others =
        here & (lane_numbers<F>() != static_cast<Lane>(row.t >= j && row.t < j + W ? row.t - j : -1));
    const F e = select(others, power(d), F{});
    const Side s = count < W ? side_part(row, j, count) : side(row, j);
    acc.s += e;
    Sums with = acc.extra;
    with.add(e, d, s.w, s.q, loss_);
    F* old = reinterpret_cast<F*>(&acc.extra);
    const F* now = reinterpret_cast<const F*>(&with);
    for (int f = 0; f < kFields; ++f) old[f] = select(here, now[f], old[f]);
    if constexpr (kKeep) store(exps_ + j, e);
  }
  template <bool kKeep>
  FL_FN void add_block(const Row& row, int64_t begin, int64_t end, R base, Accumulator* acc) {
    const int64_t full = begin + (end - begin) / W * W;
    const int64_t special = row.t >= begin && row.t < end ? begin + (row.t - begin) / W * W : full;
    for (int64_t j = begin, stop = special;; stop = full) {
      for (; j + kUnroll * W <= stop; j += kUnroll * W) {
        for (size_t b = 0; b < kUnroll * W * sizeof(T); b += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(row.x + j + kBlock) + b);
        for (int u = 0; u < kUnroll; ++u) add<kKeep>(row, j + u * W, base, acc[u]);
      }
      for (; j + W <= stop; j += W) add<kKeep>(row, j, base, acc[0]);
      if (j >= end) break;
      add_part<kKeep>(row, j, end - j < W ? end - j : W, base, acc[1]);
      j += W;
      if (j >= end) break;
    }
  }

  // Follows the running maximum into a block. -infinity: nothing but -infinity so far.
  FL_FN static bool raise(R& base, R top) {
    if (!(top > base)) return false;
    base = top;
    return true;
  }
  FL_FN static R finite(R base) { return base == -INFINITY ? 0 : base; }

  FL_FN static F& field(Accumulator& a, int f) { return reinterpret_cast<F*>(&a.extra)[f]; }

  FL_NOINLINE R accumulate(Row& row, R zt) {
    Accumulator total[kUnroll];
    R base = -INFINITY;
    const bool keep = a_.pass == RowPass::forward_gradient;
    for (int64_t begin = 0, b = 0; begin < n_; begin += kBlock, ++b) {
      const int64_t end = begin + kBlock < n_ ? begin + kBlock : n_;
      const R before = base;
      if (raise(base, block_max(row.x, begin, end)) && before != -INFINITY) {
        const R shift = before - base;
        const F factor = fill<F>(exp(shift));
        for (Accumulator& a : total) {
          a.extra.move(fill<F>(shift), factor, a.s);
          a.s *= factor;
        }
      }
      bases_[b] = base;
      Accumulator acc[kUnroll];  // a block's own: the sum of a long row would not grow any more
      if (keep) {
        add_block<true>(row, begin, end, finite(base), acc);
      } else {
        add_block<false>(row, begin, end, finite(base), acc);
      }
      for (int u = 0; u < kUnroll; ++u) {
        total[u].s += acc[u].s;
        for (int f = 0; f < kFields; ++f) field(total[u], f) += field(acc[u], f);
      }
    }
    base = finite(base);
    const R others = horizontal_sum((total[0].s + total[1].s) + (total[2].s + total[3].s));
    typename Loss::template Sums<R> sums{};
    for (int f = 0; f < kFields; ++f) {
      F v[kUnroll];
      for (int u = 0; u < kUnroll; ++u) v[u] = field(total[u], f);
      reinterpret_cast<R*>(&sums)[f] = horizontal_sum((v[0] + v[1]) + (v[2] + v[3]));
    }
    row.target.d = zt - base;
    const R e = a_.target ? exp(row.target.d) : 0;
    row.state.m = base;
    row.state.log_sum = log(others + e);
    return loss_.finish(row.state, sums, others, e, row.target);
  }

  // ---- gradient
  FL_NOINLINE void gradient(const Row& row, int64_t r, T* dx, R g) {
    const bool kept = a_.pass == RowPass::forward_gradient;
    const bool capped = Loss::kSoftcap && cap_ > 0;
    auto coef = [&] {
      const R to_x = capped ? 1 : scale_;
      if constexpr (Loss::kPlanes) {
        return loss_.coef(row.state, upstream(r), a_.asked_each, to_x);
      } else {
        return loss_.coef(row.state, row.target, g * to_x);
      }
    }();
    if constexpr (Loss::kNumbers) loss_.add(coef, g * scale_ * row.number.beside);
    const bool past_cache = a_.past_cache && dx != staged_dx_;
    const R p_target = exp(row.target.d - row.state.log_sum);  // both before dx, which may be x, is written
    const R target_slope = capped && a_.target ? slope(fill<F>(widen(row.x[row.t])))[0] : 1;
    R base = -INFINITY;
    for (int64_t begin = 0, b = 0; begin < n_; begin += kBlock, ++b) {
      const int64_t end = begin + kBlock < n_ ? begin + kBlock : n_;
      if (kept) {
        base = bases_[b];
      } else {
        raise(base, block_max(row.x, begin, end));
      }
      const R share = exp((base - row.state.m) - row.state.log_sum), from = finite(base);
      const R factor = [&] {
        if constexpr (Loss::kProportional) return share * coef.p;
        return R(0);
      }();
      auto finished = [&](F e, F x, F z, const Side& s) __attribute__((always_inline)) {
        if constexpr (Loss::kProportional) return e * factor;
        F dz = loss_.grad(e * share, z - row.state.m, s.w, s.q, coef);
        if constexpr (Loss::kSoftcap)
          if (capped) dz *= slope(x);
        return dz;
      };
      auto at = [&](int64_t j) __attribute__((always_inline)) {
        if constexpr (!Loss::kSoftcap && !Loss::kGradUsesLogit)
          if (kept) return finished(load(exps_ + j), F{}, F{}, side(row, j));
        const F x = load(row.x + j), z = logit(x);
        return finished(kept ? load(exps_ + j) : power(z - from), x, z, side(row, j));
      };
      auto part = [&](int64_t j, int64_t count) __attribute__((noinline)) {
        const F x = load_part(row.x + j, count, R(0)), z = logit(x);
        const F e = kept ? load(exps_ + j) : power(z - from);
        store_part(dx + j, finished(e, x, z, side_part(row, j, count)), count);
      };
      int64_t j = begin;
      if (past_cache) {
        const int64_t off = reinterpret_cast<uintptr_t>(dx + j) % 64 / sizeof(T);
        const int64_t head = off ? 64 / sizeof(T) - off : 0, stop = begin + head < end ? begin + head : end;
        for (; j < stop; j += W) part(j, stop - j < W ? stop - j : W);
        j = stop;
        for (; j + 2 * W <= end; j += 2 * W) {
          if constexpr (sizeof(T) * W >= 32) __builtin_prefetch(row.x + n_ + j, 0, 2);
          if constexpr (sizeof(T) * W == 64) __builtin_prefetch(row.x + n_ + j + W, 0, 2);
          stream(dx + j, at(j));
          stream(dx + j + W, at(j + W));
        }
      } else {
        for (; j + 2 * W <= end; j += 2 * W) {
          const F lo = at(j), hi = at(j + W);
          store(dx + j, lo);
          store(dx + j + W, hi);
        }
        for (; j + W <= end; j += W) store(dx + j, at(j));
      }
      for (; j < end; j += W) part(j, end - j < W ? end - j : W);
    }
    if (a_.target) {
      const R dz = loss_.target(p_target, row.target.d, row.target.weight, coef);
      if constexpr (Loss::kNumbers)
        if (row.number.total != 0) number_gradient(row, r, dx, coef, g * scale_, dz);
      if (!Loss::kNumbers || row.number.total == 0) store_one(dx + row.t, dz * target_slope);
    }
  }
  FL_FN void write_zeros(T* dx) const {
    const int64_t stride = a_.dx_layout.class_stride;
    if (stride == 1) {
      std::memset(dx, 0, n_ * sizeof(T));
    } else {
      for (int64_t j = 0; j < n_; ++j) dx[j * stride] = T{};
    }
  }

  const RowArgs& a_;
  const Loss loss_;
  const int64_t n_;
  const R scale_, cap_, inverse_cap_;
  R *number_logits_, *number_shared_, *number_own_;  // of the number tokens: logits, gradients
  R *exps_, *bases_;  // this row's exponentials, and the maximum each block's are relative to
  T *staged_x_, *staged_q_, *staged_dx_;
};

template <class Loss, class T>
FL_FN void walk_rows(const RowArgs& args, int64_t begin, int64_t end) {
  RowWalker<Loss, T>(args, Loss(args.options, args.n)).run(begin, end);
}

}  // namespace fastloss::inline FL_ISA
