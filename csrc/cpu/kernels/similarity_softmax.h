// The epilogues of the softmax: maxima and sums of exponentials of a tile's rows and columns, and their
// gradient. See similarity_passes.h.
#pragma once
#include "similarity_rows.h"

namespace fastloss::inline FL_ISA {

// ---- maxima and sums of exponentials
template <class R>
class TileEpilogue<R, TilePass::statistics> : public TileRows<R> {
  using Base = TileRows<R>;
  using Base::a_, Base::array_, Base::row_, Base::rows_, Base::kTile, Base::W, Base::kNone;
  using typename Base::F;

 public:
  static constexpr bool kColumns = true;
  using Base::Base;

  void begin_rows(int64_t row, int64_t rows) {
    Base::begin_rows(row, rows);
    for (int64_t i = 0; i < kTile; ++i) m_[i] = kNone, sum_[i] = 0;
    if (a_.positive)
      for (int64_t r = 0; r < rows; ++r) this->of_rows(a_.positive)[r] = 0;
  }

  FL_NOINLINE void tile(R* s, int64_t column, int64_t columns) {
    this->mask_entries(s, column, columns, a_.positive ? this->of_rows(a_.positive) : nullptr, this->rule());
    a_.col_max ? rows_and_columns(s, columns) : rows_alone(s, columns);
    const R *const top = array_[2], *const sum = array_[3];
    for (int64_t i = 0; i < kTile; i += W) {
      const F m = max(load(top + i), load(m_ + i)), b = softmax_base(m);
      store(sum_ + i, merged_sum(load(sum_ + i), load(m_ + i), load(sum + i), load(base_ + i), b));
      store(m_ + i, m);
    }
  }

  FL_NOINLINE void columns(int64_t column, int64_t columns, bool last) {
    if (!a_.col_max) return;
    for (int64_t j = 0; j < columns; j += W) {
      R* const to_m = static_cast<R*>(a_.col_max) + column + j;
      R* const to_s = static_cast<R*>(a_.col_log_sum) + column + j;
      const int64_t count = columns - j;
      F m = fill<F>(kNone), sum{};
      if (row_ > 0) m = get(to_m, count, kNone), sum = get(to_s, count, R(0));
      const F top = load(array_[4] + j), merged = max(top, m);
      sum = merged_sum(sum, m, load(array_[5] + j), load(col_base_ + j), softmax_base(merged));
      m = last ? softmax_base(merged) : merged;
      put(to_m, m, count);
      put(to_s, last ? log(sum) : sum, count);
    }
  }

  void end_rows() {
    if (!a_.row_max) return;
    for (int64_t r = 0; r < rows_; r += W) {
      put(this->of_rows(a_.row_max) + r, softmax_base(load(m_ + r)), rows_ - r);
      put(this->of_rows(a_.row_log_sum) + r, log(load(sum_ + r)), rows_ - r);
    }
  }

 private:
  FL_FN static F get(const R* p, int64_t count, R pad) {
    return count >= W ? load(p) : load_part(p, count, pad);
  }
  FL_FN static void put(R* p, F v, int64_t count) { count >= W ? store(p, v) : store_part(p, v, count); }
  FL_NOINLINE void rows_alone(const R* s, int64_t columns) {
    R *const top = array_[2], *const sum = array_[3];
    for (int64_t r = 0; r < kTile; ++r) top[r] = kNone, sum[r] = base_[r] = 0;
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      F m = fill<F>(kNone), total{};
      for (int64_t j = 0; j < columns; j += W) m = max(load(s + j), m);
      top[r] = horizontal_max(m);
      base_[r] = softmax_base(top[r]);
      for (int64_t j = 0; j < columns; j += W) total += exp_down(load(s + j) - base_[r]);
      sum[r] = horizontal_sum(total);
    }
  }
  FL_NOINLINE void rows_and_columns(const R* s, int64_t columns) {
    R *const top = array_[2], *const sum = array_[3], *const col_top = array_[4], *const col_sum = array_[5];
    for (int64_t i = 0; i < kTile; ++i) top[i] = kNone, sum[i] = 0, col_top[i] = kNone, col_sum[i] = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      F m = fill<F>(kNone);
      for (int64_t j = 0; j < columns; j += W) {
        const F v = load(s + r * kTile + j);
        m = max(v, m);
        store(col_top + j, max(v, load(col_top + j)));
      }
      top[r] = horizontal_max(m);
    }
    R high = kNone, low = INFINITY;
    for (int64_t i = 0; i < 2 * kTile; ++i) {
      const R t = i < kTile ? top[i] : col_top[i - kTile];
      high = max(high, t);
      if (t != kNone) low = min(low, t);
    }
    apart_ = high == kNone || !(high - low <= kSpread);
    if (apart_) {
      for (int64_t i = 0; i < kTile; i += W) {
        store(base_ + i, softmax_base(load(top + i)));
        store(col_base_ + i, softmax_base(load(col_top + i)));
      }
      add_up(
          s, columns, [&](F v, int64_t r, int64_t) { return exp_down(v - base_[r]); },
          [&](F v, F, int64_t j) { return exp_down(v - load(col_base_ + j)); });
    } else {
      for (int64_t i = 0; i < kTile; ++i) base_[i] = col_base_[i] = high;
      add_up(
          s, columns, [&](F v, int64_t, int64_t) { return exp_down(v - high); },
          [](F, F e, int64_t) { return e; });
    }
  }

  template <class Row, class Column>
  FL_FN void add_up(const R* s, int64_t columns, Row of_row, Column of_column) {
    R *const sum = array_[3], *const col_sum = array_[5];
    for (int64_t r = 0; r < rows_; ++r) {
      F total{};
      for (int64_t j = 0; j < columns; j += W) {
        const F v = load(s + r * kTile + j), e = of_row(v, r, j);
        total += e;
        store(col_sum + j, load(col_sum + j) + of_column(v, e, j));
      }
      sum[r] = horizontal_sum(total);
    }
  }

  R *&m_ = array_[0], *&sum_ = array_[1], *&base_ = array_[6], *&col_base_ = array_[7];
  bool apart_ = false;
};

// ---- their gradient
template <class R>
class SoftmaxGradient : public TileRows<R> {
  using Base = TileRows<R>;

 protected:
  using Base::a_, Base::array_, Base::row_, Base::rows_, Base::kTile, Base::W, Base::kNone;
  using typename Base::F;

  // If one base serves the whole tile: the factors of exp(s - base), for rows in array 0, for columns in
  // array 1.
  FL_NOINLINE bool one_base(int64_t column, int64_t columns, R& base) const {
    R high = kNone, low = INFINITY;
    range(a_.row_grad ? static_cast<const R*>(a_.row_max) + row_ : nullptr,
          static_cast<const R*>(a_.row_log_sum) + row_, rows_, high, low);
    range(a_.col_grad ? static_cast<const R*>(a_.col_max) + column : nullptr,
          static_cast<const R*>(a_.col_log_sum) + column, columns, high, low);
    base = high == kNone ? R(0) : high;
    if (!(high - low <= kSpread)) return false;
    factors(array_[0], a_.row_grad, a_.row_max, a_.row_log_sum, row_, rows_, base);
    factors(array_[1], a_.col_grad, a_.col_max, a_.col_log_sum, column, columns, base);
    return true;
  }
  // s becomes the softmax's gradient; epilogue(s, gradient, row, column) gives the vector that is stored.
  template <class Epilogue>
  FL_FN void gradient(R* s, int64_t column, int64_t columns, Epilogue epilogue) const {
    const R *row_max = static_cast<const R*>(a_.row_max) + row_,
            *row_sum = static_cast<const R*>(a_.row_log_sum) + row_,
            *row_grad = static_cast<const R*>(a_.row_grad) + row_;
    if (!a_.col_grad) {  // nothing of other rows
      for (int64_t r = 0; r < rows_; ++r)
        for (int64_t j = 0; j < columns; j += W) {
          R* const at = s + r * kTile + j;
          const F v = load(at);
          const F g = a_.row_grad ? row_grad[r] * softmax_prob(v, row_max[r], row_sum[r]) : F{};
          store(at, epilogue(v, g, r, j));
        }
      return;
    }
    R base;
    if (one_base(column, columns, base)) {
      for (int64_t r = 0; r < rows_; ++r)
        for (int64_t j = 0; j < columns; j += W) {
          R* const at = s + r * kTile + j;
          const F v = load(at);
          store(at, epilogue(v, exp_down(v - base) * (load(array_[1] + j) + array_[0][r]), r, j));
        }
      return;
    }
    this->of_columns(a_.col_grad, column, columns, array_[1]);
    this->of_columns(a_.col_max, column, columns, array_[2]);
    this->of_columns(a_.col_log_sum, column, columns, array_[3]);
    for (int64_t i = 0; i < kTile; ++i)
      if (array_[3][i] == kNone) array_[2][i] = INFINITY, array_[3][i] = 0;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t j = 0; j < columns; j += W) {
        R* const at = s + r * kTile + j;
        const F v = load(at);
        F g = load(array_[1] + j) * exp_down((v - load(array_[2] + j)) - load(array_[3] + j));
        if (a_.row_grad) g += row_grad[r] * softmax_prob(v, row_max[r], row_sum[r]);
        store(at, epilogue(v, g, r, j));
      }
  }

 private:
  static void range(const R* m, const R* log_sum, int64_t count, R& high, R& low) {
    for (int64_t i = 0; m && i < count; ++i) {
      if (log_sum[i] == kNone) continue;
      high = max(high, m[i] + log_sum[i]);
      low = min(low, m[i] + log_sum[i]);
    }
  }
  static void factors(R* to, const void* grad, const void* m, const void* log_sum, int64_t first,
                      int64_t count, R base) {
    for (int64_t i = 0; i < kTile; ++i) to[i] = 0;
    for (int64_t i = 0; grad && i < count; ++i) to[i] = base - static_cast<const R*>(m)[first + i];
    for (int64_t i = 0; grad && i < count; ++i) {  // apart from the exponentials, which are vectors
      const R s = static_cast<const R*>(log_sum)[first + i];
      to[i] = s == kNone ? kNone : to[i] - s;
    }
    for (int64_t i = 0; grad && i < kTile; i += W) store(to + i, exp(load(to + i)));
    for (int64_t i = 0; grad && i < kTile; ++i)
      to[i] = i < count ? to[i] * static_cast<const R*>(grad)[first + i] : 0;
  }

 public:
  using Base::Base;
};

template <class R>
class TileEpilogue<R, TilePass::softmax_gradient> : public SoftmaxGradient<R> {
  using Base = SoftmaxGradient<R>;
  using Base::a_, Base::array_, Base::rows_, Base::kTile, Base::W;
  using typename Base::F;

 public:
  using Base::Base;
  FL_NOINLINE void tile(R* s, int64_t column, int64_t columns) {
    R* const col_up = array_[4];
    this->of_columns(a_.col_positive_grad, column, columns, col_up);
    const EntryRule rule = this->rule();
    this->mask_entries(s, column, columns, nullptr, rule);
    const R* const up = a_.positive_grad ? this->of_rows(a_.positive_grad) : nullptr;
    if (up && rule(false, true) == Entry::positive) {
      this->gradient(s, column, columns, [&](F, F g, int64_t r, int64_t j) {
        return g + select(this->same(r, column + j), load(col_up + j) + up[r], F{});
      });
    } else {
      this->gradient(s, column, columns, [](F, F g, int64_t, int64_t) { return g; });
    }
    const bool target_is_positive = rule(true, false) == Entry::positive;
    const bool keep_target = rule.summed(rule(true, false));
    for (int64_t r = 0; a_.target_col && r < rows_; ++r) {
      const int64_t at = this->target_in_tile(r, column, columns);
      if (at < 0) continue;
      R& g = s[r * kTile + at];
      if (!keep_target) g = 0;
      if (up && target_is_positive) g = keep_target ? g + (up[r] + col_up[at]) : up[r] + col_up[at];
    }
    Base::pad(s, rows_, columns, 0);
  }
};

}  // namespace fastloss::inline FL_ISA
