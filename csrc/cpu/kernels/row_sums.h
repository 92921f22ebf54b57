// The sums of one row, relative to a running maximum, block by block; and the pending gradient of the row
// before, which is written with streaming stores line by line between the additions, so that arithmetic and
// memory traffic overlap.
#pragma once
#include "row_gradient.h"

namespace fastloss::inline FL_ISA {

template <class Loss, class T>
class RowSums : protected RowGradient<Loss, T> {
  using Base = RowGradient<Loss, T>;

 protected:
  using Base::a_, Base::loss_, Base::n_, Base::W, Base::kUnroll, Base::kLine, Base::kBlock;
  using Base::Base;
  using Base::proportion, Base::before_line, Base::write_target, Base::exps_, Base::bases_;
  using Base::raise, Base::below, Base::power, Base::powers, Base::side, Base::side_part, Base::block_max;
  using typename Base::R, typename Base::F, typename Base::Row, typename Base::Side, typename Base::Gradient;
  using Lane = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  using Sums = typename Loss::template Sums<F>;
  // A gradient that is a multiple of the exponentials needs nothing else, and may be written a row later.
  static constexpr bool kMayDefer = Loss::kProportional && !Loss::kOutputs;
  static constexpr int kFields = std::is_empty_v<Sums> ? 0 : sizeof(Sums) / sizeof(F);  // vectors of Sums

  struct Accumulator {
    F s{};                               // exponentials of all classes but the target
    [[no_unique_address]] Sums extra{};  // the loss's sums
  };
  // Whole cache lines of one block of the pending gradient that are not written yet: dx = exps * factor.
  struct Lines {
    const R* exps = nullptr;
    T* dx = nullptr;
    int64_t left = 0;  // elements
    R factor = 0;
  };

  // ---- addition of vectors
  template <bool kSaveExps, int N>
  FL_FN void add(const Row& row, int64_t j, R base, Accumulator (&acc)[N], const T* x, R* exps) const {
    F d[N], e[N];
    for (int u = 0; u < N; ++u) d[u] = below(load(x + j + u * W), base);
    powers(d, e);
    for (int u = 0; u < N; ++u) {
      const Side s = side(row, j + u * W);
      acc[u].s += e[u];
      acc[u].extra.add(e[u], d[u], s.w, s.q, loss_);
      if constexpr (kSaveExps) store(exps + j + u * W, e[u]);
    }
  }
  // One vector of `count` elements; where it holds the target, that exponential is left out.
  template <bool kSaveExps>
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
    if constexpr (kSaveExps) store(exps_ + j, e);
  }
  // Whole vectors without the target; between them lines of the pending gradient.
  template <bool kSaveExps>
  FL_NOINLINE void add_plain(const Row& row, int64_t begin, int64_t end, R base, Accumulator* acc,
                             Lines& lines) const {
    const T* const x = row.x;
    R* const exps = exps_;
    Accumulator even[2] = {acc[0], acc[1]}, odd[2] = {acc[2], acc[3]};  // copies that stay in registers
    Lines out = lines;
    auto line = [&] {
      if constexpr (kSaveExps && kMayDefer)
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
      add<kSaveExps>(row, j, base, even, x, exps);
      line();
      add<kSaveExps>(row, j + 2 * W, base, odd, x, exps);
      line();
    }
    for (; j < end; j += W) {
      Accumulator one[1] = {even[0]};
      add<kSaveExps>(row, j, base, one, x, exps);
      even[0] = one[0];
    }
    acc[0] = even[0], acc[1] = even[1], acc[2] = odd[0], acc[3] = odd[1];
    lines = out;
  }
  template <bool kSaveExps>
  FL_FN void add_block(const Row& row, int64_t begin, int64_t end, R base, Accumulator* acc, Lines& lines) {
    const int64_t full = begin + (end - begin) / W * W;
    if (row.t >= begin && row.t < full) {
      const int64_t special = begin + (row.t - begin) / W * W;
      add_plain<kSaveExps>(row, begin, special, base, acc, lines);
      add_part<kSaveExps>(row, special, W, base, acc[1]);
      add_plain<kSaveExps>(row, special + W, full, base, acc, lines);
    } else {
      add_plain<kSaveExps>(row, begin, full, base, acc, lines);
    }
    if (full < end) add_part<kSaveExps>(row, full, end - full, base, acc[1]);
  }

  FL_FN static F& field(Accumulator& a, int f) { return reinterpret_cast<F*>(&a.extra)[f]; }

  // Statistics and loss of the row, whose target has the logit zt. Completes the pending gradient.
  FL_NOINLINE R accumulate(Row& row, R zt) {
    Accumulator total[kUnroll];
    R base = -INFINITY;
    const bool save_exps = a_.pass == RowPass::forward_gradient;
    for (int64_t begin = 0, b = 0; begin < n_; begin += kBlock, ++b) {
      const int64_t end = begin + kBlock < n_ ? begin + kBlock : n_;
      const R before = base;
      if (raise(base, block_max(row.x, begin, end)) && before != -INFINITY) {
        const R shift = finite_shift(before - base);
        const F factor = fill<F>(exp(shift));
        for (Accumulator& a : total) {
          a.extra.move(fill<F>(shift), factor, a.s);
          a.s *= factor;
        }
      }
      bases_[b] = base;
      Accumulator acc[kUnroll];  // of this block alone: added to the sum of a long row, terms would be lost
      Lines lines;
      if (save_exps) {
        if constexpr (kMayDefer)
          if (has_pending_) lines = pending_lines(begin, end, b);
        add_block<true>(row, begin, end, softmax_base(base), acc, lines);
        if constexpr (kMayDefer)
          if (has_pending_) finish_lines(lines, end);
      } else {
        add_block<false>(row, begin, end, softmax_base(base), acc, lines);
      }
      for (int u = 0; u < kUnroll; ++u) {
        total[u].s += acc[u].s;
        for (int f = 0; f < kFields; ++f) field(total[u], f) += field(acc[u], f);
      }
    }
    if constexpr (kMayDefer)
      if (has_pending_) write_target(pending_);
    has_pending_ = false;
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

  // ---- the pending gradient, block by block
  // Writes up to the first cache line boundary of the block, and gives the whole lines after it.
  FL_NOINLINE Lines pending_lines(int64_t begin, int64_t end, int64_t b) const {
    const R factor = proportion(pending_, pending_.bases[b]);
    const int64_t head = before_line(pending_.dx + begin), first = begin + head < end ? begin + head : end;
    write_pending(begin, first, factor);
    return {pending_.exps + first, pending_.dx + first, (end - first) / kLine * kLine, factor};
  }
  FL_NOINLINE void finish_lines(Lines lines, int64_t end) const {
    for (; lines.left >= kLine; lines.left -= kLine) {
      for (int k = 0; k < kLine; k += W) stream(lines.dx + k, load(lines.exps + k) * lines.factor);
      lines.dx += kLine;
      lines.exps += kLine;
    }
    write_pending(lines.dx - pending_.dx, end, lines.factor);
  }
  FL_FN void write_pending(int64_t begin, int64_t end, R factor) const {
    for (int64_t j = begin; j < end; j += W)
      store_part(pending_.dx + j, load(pending_.exps + j) * factor, end - j < W ? end - j : W);
  }

  R *other_exps_, *other_bases_;  // as exps_, bases_, of the row whose gradient is pending
  Gradient pending_;
  bool has_pending_ = false;
};

}  // namespace fastloss::inline FL_ISA
