// The gradient of one row from its exponentials. A forward pass takes these from the scratch row that the
// summation filled; a backward pass computes them again, by the same arithmetic, from the saved statistics.
#pragma once
#include "row_extras.h"

namespace fastloss::inline FL_ISA {

template <class Loss, class T>
class RowGradient : protected RowExtras<Loss, T> {
  using Base = RowExtras<Loss, T>;

 protected:
  using Base::a_, Base::loss_, Base::n_, Base::scale_, Base::cap_, Base::W;
  using Base::Base;
  using Base::raise, Base::slope, Base::below, Base::power, Base::powers, Base::side, Base::side_part,
      Base::block_max;
  using typename Base::R, typename Base::F, typename Base::GradCoef, typename Base::Row, typename Base::Side;
  static constexpr int kTogether = 2;                   // vectors whose exponentials are interleaved
  static constexpr int kLine = 64 / sizeof(T);          // elements of a cache line
  static constexpr int64_t kBlock = 32768 / sizeof(R);  // elements whose exponentials fit in the L1 cache

  // Everything needed to write the gradient of a row whose statistics are known.
  struct Gradient {
    Row row;
    int64_t r;
    T* dx;
    R g;  // upstream gradient times row weight
    GradCoef coef;
    R p_target, target_slope;  // read before dx, which may be x, is written
    const R *exps, *bases;     // as exps_, bases_
  };

  FL_NOINLINE Gradient gradient(const Row& row, int64_t r, T* dx, R g) const {
    const bool capped = Loss::kSoftcap && cap_ > 0;
    Gradient now{.row = row, .r = r, .dx = dx, .g = g, .exps = exps_, .bases = bases_};
    const R to_x = capped ? 1 : scale_;
    if constexpr (Loss::kOutputs) {
      now.coef = loss_.grad_coef(row.state, this->upstream(r), a_.num_index, to_x);
    } else {
      now.coef = loss_.grad_coef(row.state, row.target, g * to_x);
    }
    if constexpr (Loss::kNumberTokens) loss_.add(now.coef, g * scale_, row.number.dense_coef);
    now.p_target = exp(row.target.d - row.state.log_sum);
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
        if constexpr (Loss::kOutputs) {
          base = now.row.state.m;  // no forward pass writes this gradient: there are no block bases to match
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
    if constexpr (Loss::kNumberTokens)
      if (now.row.number.total != 0)
        return this->number_gradient(now.row, now.r, now.dx, now.coef, now.g * scale_, dz);
    store_one(now.dx + now.row.t, dz * now.target_slope);
  }
  // The factor from exp(z - base) to the gradient, where the gradient is proportional to p.
  FL_FN R proportion(const Gradient& g, R base) const {
    if constexpr (Loss::kProportional) return exp((base - g.row.state.m) - g.row.state.log_sum) * g.coef.p;
    return 0;
  }
  // Elements before the first cache line boundary.
  FL_FN static int64_t before_line(const T* dx) {
    const int64_t off = reinterpret_cast<uintptr_t>(dx) % 64 / sizeof(T);
    return off ? kLine - off : 0;
  }

  // Whole cache lines of a large dx are written with streaming stores.
  template <bool kSavedExps>
  FL_NOINLINE void write_block(const Gradient& now, int64_t begin, int64_t end, R base) const {
    const bool capped = Loss::kSoftcap && cap_ > 0;
    const Row& row = now.row;
    T* const dx = now.dx;
    const R inv_sum = exp((base - row.state.m) - row.state.log_sum), from = softmax_base(base);
    const R factor = proportion(now, base);
    auto finished = [&](F e, F x, const Side& s) __attribute__((always_inline)) {
      if constexpr (Loss::kProportional) return e * factor;
      F dz = loss_.grad(e * inv_sum, below(x, row.state.m), s.w, s.q, now.coef);
      if constexpr (Loss::kSoftcap)
        if (capped) dz *= slope(x);
      return dz;
    };
    auto at = [&]<int N>(int64_t j, F(&dz)[N]) __attribute__((always_inline)) {
      F x[N], e[N];
      for (int u = 0; u < N; ++u) x[u] = load(row.x + j + u * W);
      if constexpr (kSavedExps) {
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
      const F e = kSavedExps ? load(now.exps + j) : power(below(x, from));
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

  // Scratch: the current row's exponentials [n]; for each block the maximum that they are relative to.
  R *exps_, *bases_;
  T *staged_x_, *staged_q_, *staged_dx_;  // scratch: contiguous copies of strided rows
};

}  // namespace fastloss::inline FL_ISA
