// How a CPU walks rows of logits: one sweep over memory for value and gradient.
//
// A row is taken in blocks that fit in the first-level cache. Each block is searched for its maximum, then
// summed against the running maximum while the next block is prefetched; for the gradient the exponentials go
// to a scratch row that stays in the second-level cache, from where they are scaled and written out, past the
// caches when the output is larger than these, and then line by line while the next row is summed: arithmetic
// and memory work at the same time. Nothing but two such scratch rows is stored between. The backward pass
// repeats the same arithmetic from the saved statistics, so both ways give the same bits.
#pragma once
#include "../core/row_loss.h"
#include "../core/rows.h"
#include "../core/simd.h"
#include "../losses/number_token.h"
#include "scratch.h"

#include <utility>

namespace fastloss::inline FL_ISA {

template <class Loss, class T>
class RowWalker {
  using R = acc_t<T>;
  using F = vector_t<R>;
  using Lane = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  using Sums = typename Loss::template Sums<F>;
  using Coef = typename Loss::Coef;
  static constexpr int W = kLanes<F>, kUnroll = 4, kStateHead = 3;  // state: m, log_sum, k, saved...
  static constexpr int kTogether = 2;  // vectors whose exponentials are taken side by side
  static constexpr bool kMayWait = Loss::kProportional && !Loss::kPlanes;
  static constexpr int kLine = 64 / sizeof(T);  // elements
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
    const int64_t kept = exps + blocks * sizeof(R);
    const int64_t staged = padded * sizeof(T), numbers = (args.numbers + W - 1) / W * W * sizeof(R);
    char* p = static_cast<char*>(cpu::thread_scratch(2 * kept + 3 * staged + 3 * numbers + 64));
    exps_ = reinterpret_cast<R*>(p);
    other_exps_ = reinterpret_cast<R*>(p + exps);
    p += 2 * exps;
    bases_ = reinterpret_cast<R*>(p);
    other_bases_ = bases_ + blocks;
    p += 2 * blocks * sizeof(R);
    staged_x_ = reinterpret_cast<T*>(p);
    staged_q_ = reinterpret_cast<T*>(p + staged);
    staged_dx_ = reinterpret_cast<T*>(p + 2 * staged);
    number_logits_ = reinterpret_cast<R*>(p + 3 * staged);
    number_shared_ = number_logits_ + numbers / sizeof(R);
    number_own_ = number_shared_ + numbers / sizeof(R);
  }

  FL_FN void run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
    if (waits_) write(waiting_);
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
  struct Gradient {  // what is left of a row to write its gradient from its exponentials
    Row row;
    int64_t r;
    T* dx;
    R g;
    Coef coef;
    R p_target, target_slope;
    const R *exps, *bases;
  };
  struct Lines {  // of a block of such a gradient, whole and not yet written
    const R* exps = nullptr;
    T* dx = nullptr;
    int64_t left = 0;  // elements
    R factor = 0;
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
    const Gradient now = gradient(row, r, out, g * k);
    if constexpr (kMayWait)
      if (a_.pass == RowPass::forward_gradient && a_.past_cache && out == dx) {
        waiting_ = now;
        waits_ = true;
        std::swap(exps_, other_exps_);
        std::swap(bases_, other_bases_);
        return;
      }
    write(now);
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

  template <bool kKeep, int N>
  FL_FN void add(const Row& row, int64_t j, R base, Accumulator (&acc)[N], const T* x, R* exps) const {
    F d[N], e[N];
    for (int u = 0; u < N; ++u) d[u] = below(load(x + j + u * W), base);
    powers(d, e);
    for (int u = 0; u < N; ++u) {
      const Side s = side(row, j + u * W);
      acc[u].s += e[u];
      acc[u].extra.add(e[u], d[u], s.w, s.q, loss_);
      if constexpr (kKeep) store(exps + j + u * W, e[u]);
    }
  }
  // `count` elements from j on, the target's among them perhaps: its exponential does not count
  template <bool kKeep>
  FL_NOINLINE void add_part(const Row& row, int64_t j, int64_t count, R base, Accumulator& acc) {
    const F x = count < W ? load_part(row.x + j, count, R(0)) : load(row.x + j);
    const F d = below(x, base);
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
  // Whole vectors, the target in none of them.
  template <bool kKeep>
  FL_NOINLINE void add_plain(const Row& row, int64_t begin, int64_t end, R base, Accumulator* acc,
                             Lines& lines) const {
    const T* const x = row.x;
    R* const exps = exps_;
    Accumulator even[2] = {acc[0], acc[1]}, odd[2] = {acc[2], acc[3]};  // nobody else's: in registers
    Lines out = lines;
    auto line = [&] {
      if constexpr (kKeep && kMayWait)
        if (out.left >= 2 * W) {
          stream(out.dx, load(out.exps) * out.factor);
          stream(out.dx + W, load(out.exps + W) * out.factor);
          out.dx += 2 * W;
          out.exps += 2 * W;
          out.left -= 2 * W;
        }
    };
    int64_t j = begin;
    for (; j + 4 * W <= end; j += 4 * W) {
      for (size_t b = 0; b < 4 * W * sizeof(T); b += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(x + j + kBlock) + b);
      add<kKeep>(row, j, base, even, x, exps);
      line();
      add<kKeep>(row, j + 2 * W, base, odd, x, exps);
      line();
    }
    for (; j < end; j += W) {
      Accumulator one[1] = {even[0]};
      add<kKeep>(row, j, base, one, x, exps);
      even[0] = one[0];
    }
    acc[0] = even[0], acc[1] = even[1], acc[2] = odd[0], acc[3] = odd[1];
    lines = out;
  }
  template <bool kKeep>
  FL_FN void add_block(const Row& row, int64_t begin, int64_t end, R base, Accumulator* acc, Lines& lines) {
    const int64_t full = begin + (end - begin) / W * W;
    if (row.t >= begin && row.t < full) {
      const int64_t special = begin + (row.t - begin) / W * W;
      add_plain<kKeep>(row, begin, special, base, acc, lines);
      add_part<kKeep>(row, special, W, base, acc[1]);
      add_plain<kKeep>(row, special + W, full, base, acc, lines);
    } else {
      add_plain<kKeep>(row, begin, full, base, acc, lines);
    }
    if (full < end) add_part<kKeep>(row, full, end - full, base, acc[1]);
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
      Lines lines;
      if (keep) {
        if constexpr (kMayWait)
          if (waits_) lines = waiting_block(begin, end, b);
        add_block<true>(row, begin, end, finite(base), acc, lines);
        if constexpr (kMayWait)
          if (waits_) finish_block(lines, end);
      } else {
        add_block<false>(row, begin, end, finite(base), acc, lines);
      }
      for (int u = 0; u < kUnroll; ++u) {
        total[u].s += acc[u].s;
        for (int f = 0; f < kFields; ++f) field(total[u], f) += field(acc[u], f);
      }
    }
    if constexpr (kMayWait)
      if (waits_) write_target(waiting_);
    waits_ = false;
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
  FL_NOINLINE Gradient gradient(const Row& row, int64_t r, T* dx, R g) const {
    const bool capped = Loss::kSoftcap && cap_ > 0;
    Gradient now{.row = row, .r = r, .dx = dx, .g = g, .exps = exps_, .bases = bases_};
    const R to_x = capped ? 1 : scale_;
    if constexpr (Loss::kPlanes) {
      now.coef = loss_.coef(row.state, upstream(r), a_.asked_each, to_x);
    } else {
      now.coef = loss_.coef(row.state, row.target, g * to_x);
    }
    if constexpr (Loss::kNumbers) loss_.add(now.coef, g * scale_ * row.number.beside);
    now.p_target = exp(row.target.d - row.state.log_sum);  // both before dx, which may be x, is written
    now.target_slope = capped && a_.target ? slope(fill<F>(widen(row.x[row.t])))[0] : 1;
    return now;
  }
  FL_NOINLINE void write(const Gradient& now) const {
    R base = -INFINITY;
    for (int64_t begin = 0, b = 0; begin < n_; begin += kBlock, ++b) {
      const int64_t end = begin + kBlock < n_ ? begin + kBlock : n_;
      if (a_.pass == RowPass::forward_gradient) {
        write_block<true>(now, begin, end, now.bases[b]);
      } else {
        raise(base, block_max(now.row.x, begin, end));
        write_block<false>(now, begin, end, base);
      }
    }
    write_target(now);
  }
  FL_FN void write_target(const Gradient& now) const {
    if (!a_.target) return;
    const R dz = loss_.target(now.p_target, now.row.target.d, now.row.target.weight, now.coef);
    if constexpr (Loss::kNumbers)
      if (now.row.number.total != 0)
        return number_gradient(now.row, now.r, now.dx, now.coef, now.g * scale_, dz);
    store_one(now.dx + now.row.t, dz * now.target_slope);
  }
  // Elements before the first whole line of the cache.
  FL_FN static int64_t before_line(const T* dx) {
    const int64_t off = reinterpret_cast<uintptr_t>(dx) % 64 / sizeof(T);
    return off ? kLine - off : 0;
  }

  // ---- a gradient that waits for the next row
  FL_NOINLINE Lines waiting_block(int64_t begin, int64_t end, int64_t b) const {
    const R factor = proportion(waiting_, waiting_.bases[b]);
    const int64_t head = before_line(waiting_.dx + begin), first = begin + head < end ? begin + head : end;
    write_parts(begin, first, factor);
    return {waiting_.exps + first, waiting_.dx + first, (end - first) / kLine * kLine, factor};
  }
  FL_NOINLINE void finish_block(Lines rest, int64_t end) const {
    for (; rest.left >= kLine; rest.left -= kLine) {
      for (int k = 0; k < kLine; k += W) stream(rest.dx + k, load(rest.exps + k) * rest.factor);
      rest.dx += kLine;
      rest.exps += kLine;
    }
    write_parts(rest.dx - waiting_.dx, end, rest.factor);
  }
  FL_FN void write_parts(int64_t begin, int64_t end, R factor) const {
    for (int64_t j = begin; j < end; j += W)
      store_part(waiting_.dx + j, load(waiting_.exps + j) * factor, end - j < W ? end - j : W);
  }
  FL_FN R proportion(const Gradient& g, R base) const {
    if constexpr (Loss::kProportional) return exp((base - g.row.state.m) - g.row.state.log_sum) * g.coef.p;
    return 0;
  }

  template <bool kKept>
  FL_NOINLINE void write_block(const Gradient& now, int64_t begin, int64_t end, R base) const {
    const bool capped = Loss::kSoftcap && cap_ > 0;
    const Row& row = now.row;
    T* const dx = now.dx;
    const R share = exp((base - row.state.m) - row.state.log_sum), from = finite(base);
    const R factor = proportion(now, base);
    auto finished = [&](F e, F x, const Side& s) __attribute__((always_inline)) {
      if constexpr (Loss::kProportional) return e * factor;
      F dz = loss_.grad(e * share, logit(x) - row.state.m, s.w, s.q, now.coef);
      if constexpr (Loss::kSoftcap)
        if (capped) dz *= slope(x);
      return dz;
    };
    auto at = [&]<int N>(int64_t j, F(&dz)[N]) __attribute__((always_inline)) {
      F x[N], e[N];
      for (int u = 0; u < N; ++u) x[u] = load(row.x + j + u * W);
      if constexpr (kKept) {
        for (int u = 0; u < N; ++u) e[u] = load(now.exps + j + u * W);
      } else {
        F d[N];
        for (int u = 0; u < N; ++u) d[u] = below(x[u], from);
        powers(d, e);
      }
      for (int u = 0; u < N; ++u) dz[u] = finished(e[u], x[u], side(row, j + u * W));
    };
    auto part = [&](int64_t j, int64_t count) __attribute__((noinline)) {
      const F x = load_part(row.x + j, count, R(0));
      const F e = kKept ? load(now.exps + j) : power(below(x, from));
      store_part(dx + j, finished(e, x, side_part(row, j, count)), count);
    };
    int64_t j = begin;
    if (a_.past_cache && dx != staged_dx_) {
      const int64_t head = before_line(dx + j), stop = begin + head < end ? begin + head : end;
      for (; j < stop; j += W) part(j, stop - j < W ? stop - j : W);
      j = stop;
      constexpr int kStep = kLine > kTogether * W ? kLine : kTogether * W;
      for (; j + kStep <= end; j += kStep) {
        for (int64_t next = j; next < j + kStep; next += kLine) __builtin_prefetch(row.x + n_ + next, 0, 2);
        for (int u = 0; u < kStep / W; u += kTogether) {
          F dz[kTogether];
          at(j + u * W, dz);
          for (int k = 0; k < kTogether; ++k) stream(dx + j + (u + k) * W, dz[k]);
        }
      }
    } else {
      for (; j + kTogether * W <= end; j += kTogether * W) {
        F dz[kTogether];
        at(j, dz);
        for (int k = 0; k < kTogether; ++k) store(dx + j + k * W, dz[k]);
      }
      for (; j + W <= end; j += W) {
        F dz[1];
        at(j, dz);
        store(dx + j, dz[0]);
      }
    }
    for (; j < end; j += W) part(j, end - j < W ? end - j : W);
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
  R *exps_, *bases_;              // this row's exponentials, and the maximum each block's are relative to
  R *other_exps_, *other_bases_;  // of the row whose gradient waits
  Gradient waiting_;
  bool waits_ = false;
  T *staged_x_, *staged_q_, *staged_dx_;
};

template <class Loss, class T>
FL_FN void walk_rows(const RowArgs& args, int64_t begin, int64_t end) {
  RowWalker<Loss, T>(args, Loss(args.options, args.n)).run(begin, end);
}

}  // namespace fastloss::inline FL_ISA
