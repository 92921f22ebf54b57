// How a CPU walks rows of logits: one sweep over memory for value and gradient.
//
// A row is taken in blocks that fit in the first-level cache. Each block is searched for its maximum, then
// summed against the running maximum while the next block is prefetched; for the gradient the exponentials go
// to a scratch row that stays in the second-level cache, from where they are scaled and written out, past the
// caches when the output is larger than these, and then line by line while the next row is summed: arithmetic
// and memory work at the same time. Nothing but two such scratch rows is stored between. The backward pass
// repeats the same arithmetic from the saved statistics, so both ways give the same bits.
#pragma once
#include <utility>

#include "../scratch.h"
#include "row_base.h"

namespace fastloss::inline FL_ISA {

template <class Loss, class T>
class RowKernel : RowBase<Loss, T> {
  using Base = RowBase<Loss, T>;
  using Base::a_, Base::loss_, Base::n_, Base::scale_, Base::cap_, Base::W, Base::kUnroll;
  using Base::number_logits_, Base::number_shared_, Base::number_self_;
  using Base::raise, Base::logit, Base::slope, Base::below, Base::power, Base::powers;
  using Base::side, Base::side_part, Base::block_max;
  using typename Base::R, typename Base::F, typename Base::GradCoef, typename Base::Row, typename Base::Side;
  using Lane = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  using Sums = typename Loss::template Sums<F>;
  static constexpr int kTogether = 2;  // vectors whose exponentials are taken side by side
  static constexpr bool kMayWait = Loss::kProportional && !Loss::kPlanes;
  static constexpr int kLine = 64 / sizeof(T);  // elements
  static constexpr int64_t kBlock = 32768 / sizeof(R);
  static constexpr int kFields = std::is_empty_v<Sums> ? 0 : sizeof(Sums) / sizeof(F);

 public:
  FL_FN RowKernel(const RowArgs& args, const Loss& loss) : Base(args, loss) {
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
    number_self_ = number_shared_ + numbers / sizeof(R);
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
  struct Gradient {  // what is left of a row to write its gradient from its exponentials
    Row row;
    int64_t r;
    T* dx;
    R g;
    GradCoef coef;
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
    R k = a_.pass == RowPass::backward ? state[2] : this->row_weight(r, row.t);
    if (k == 0) {
      if (a_.pass != RowPass::backward) {
        for (int64_t i = 0; i < a_.state_width; ++i) state[i] = 0;
        if constexpr (Loss::kPlanes) {
          for (int64_t i = 0; i < a_.planes; ++i) this->results(r)[i] = 0;
        } else {
          static_cast<R*>(a_.loss)[r] = 0;
        }
      }
      if (dx) write_zeros(dx);
      return;
    }
    row.x = this->contiguous(static_cast<const T*>(a_.x), a_.x_layout, r, staged_x_);
    row.q = a_.q ? this->contiguous(static_cast<const T*>(a_.q), a_.q_layout, r, staged_q_) : nullptr;
    row.target.hard = a_.target;
    row.target.weight = a_.target ? this->class_weight(row.t) : 1;
    const R zt = a_.target ? logit(fill<F>(widen(row.x[row.t])))[0] : 0;
    R g = 1;
    if (a_.pass == RowPass::backward) {
      row.state.m = state[0];
      row.state.log_sum = state[1];
      for (int i = 0; i < Loss::kSaved; ++i) row.state.saved[i] = state[kStateHead + i];
      row.target.d = zt - row.state.m;
      if constexpr (!Loss::kPlanes) g = static_cast<const R*>(a_.upstream)[r * a_.upstream_stride];
      if constexpr (Loss::kNumbers) this->number_term(row, r);
    } else {
      if constexpr (Loss::kPlanes) {
        accumulate(row, zt);
        loss_.write(row.state, this->results(r));
        this->write_asked(row, r);
      } else {
        R value = accumulate(row, zt);
        if constexpr (Loss::kNumbers) value += this->number_term(row, r);
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
    if constexpr (Loss::kPlanes) this->asked_gradient(row, r, out);
    if (out != dx)
      for (int64_t j = 0; j < n_; ++j) dx[j * a_.dx_layout.class_stride] = out[j];
  }

  // ---- statistics
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
        add_block<true>(row, begin, end, softmax_base(base), acc, lines);
        if constexpr (kMayWait)
          if (waits_) finish_block(lines, end);
      } else {
        add_block<false>(row, begin, end, softmax_base(base), acc, lines);
      }
      for (int u = 0; u < kUnroll; ++u) {
        total[u].s += acc[u].s;
        for (int f = 0; f < kFields; ++f) field(total[u], f) += field(acc[u], f);
      }
    }
    if constexpr (kMayWait)
      if (waits_) write_target(waiting_);
    waits_ = false;
    base = softmax_base(base);
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
    return loss_.project(row.state, sums, others, e, row.target);
  }

  // ---- gradient
  FL_NOINLINE Gradient gradient(const Row& row, int64_t r, T* dx, R g) const {
    const bool capped = Loss::kSoftcap && cap_ > 0;
    Gradient now{.row = row, .r = r, .dx = dx, .g = g, .exps = exps_, .bases = bases_};
    const R to_x = capped ? 1 : scale_;
    if constexpr (Loss::kPlanes) {
      now.coef = loss_.grad_coef(row.state, this->upstream(r), a_.asked_each, to_x);
    } else {
      now.coef = loss_.grad_coef(row.state, row.target, g * to_x);
    }
    if constexpr (Loss::kNumbers) loss_.add(now.coef, g * scale_ * row.number.dense_coef);
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
        if constexpr (Loss::kPlanes) {
          base = now.row.state.m;  // no other pass writes this gradient, in other blocks' terms
        } else {
          raise(base, block_max(now.row.x, begin, end));
        }
        write_block<false>(now, begin, end, base);
      }
    }
    write_target(now);
  }
  FL_FN void write_target(const Gradient& now) const {
    if (!a_.target) return;
    const R dz = loss_.grad_at_target(now.p_target, now.row.target.d, now.row.target.weight, now.coef);
    if constexpr (Loss::kNumbers)
      if (now.row.number.total != 0)
        return this->number_gradient(now.row, now.r, now.dx, now.coef, now.g * scale_, dz);
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
    const R share = exp((base - row.state.m) - row.state.log_sum), from = softmax_base(base);
    const R factor = proportion(now, base);
    auto finished = [&](F e, F x, const Side& s) __attribute__((always_inline)) {
      if constexpr (Loss::kProportional) return e * factor;
      F dz = loss_.grad(e * share, below(x, row.state.m), s.w, s.q, now.coef);
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

  R *exps_, *bases_;              // this row's exponentials, and the maximum each block's are relative to
  R *other_exps_, *other_bases_;  // of the row whose gradient waits
  Gradient waiting_;
  bool waits_ = false;
  T *staged_x_, *staged_q_, *staged_dx_;
};

template <class Loss, class T>
FL_FN void run_rows(const RowArgs& args, int64_t begin, int64_t end) {
  RowKernel<Loss, T>(args, Loss(args.hparams, args.n)).run(begin, end);
}

}  // namespace fastloss::inline FL_ISA
