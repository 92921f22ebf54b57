// What each pass makes of a tile of similarities, s[kTile][kTile] with rows and columns that count.
//
// begin_rows, then for each block of columns `tile` and, in the order of the blocks of rows, `columns`; then
// end_rows. Columns are padded to whole vectors with -infinity, or zeros where the tile is a gradient.
#pragma once
#include "../core/vector_math.h"
#include "../losses/contrastive.h"
#include "tiles.h"

namespace fastloss::inline FL_ISA {

template <class F>
FL_FN bool any(F mask) {
  uint64_t part[sizeof(F) / 8], all = 0;
  std::memcpy(part, &mask, sizeof mask);
  for (uint64_t p : part) all |= p;
  return all != 0;
}

// Exponents relative to one number for a whole tile, where they stay this close, cost one exp an element.
inline constexpr int kSpread = 40;

template <class R>
class TileRows {
 protected:
  using F = vector_t<R>;
  static constexpr int W = kLanes<F>;
  static constexpr int64_t kTile = cpu::kTile;
  static constexpr R kNone = -INFINITY;
  static constexpr int64_t kArrays = 8;

 public:
  static constexpr bool kColumns = false;
  static constexpr int64_t kScratch = kArrays * kTile;
  explicit TileRows(const cpu::TileCall& a) : a_(a) {}
  void scratch(R* p) {
    for (int64_t k = 0; k < kArrays; ++k) array_[k] = p + k * kTile;
  }
  void begin_rows(int64_t row, int64_t rows) { row_ = row, rows_ = rows; }
  void columns(int64_t, int64_t, bool) {}
  void end_rows() {}

 protected:
  FL_FN R* of_rows(void* array) const { return static_cast<R*>(array) + row_; }
  // The marked column of row r within the tile, or -1.
  FL_FN int64_t marked(int64_t r, int64_t column, int64_t columns) const {
    const int64_t at = a_.mark ? a_.mark[row_ + r] - column : -1;
    return at >= 0 && at < columns ? at : -1;
  }
  FL_FN auto same(int64_t r, int64_t column) const {
    return load(static_cast<const R*>(a_.col_ids) + column) ==
           fill<F>(static_cast<const R*>(a_.row_ids)[row_ + r]);
  }
  // The part of an array of columns that is beside this tile, zeros where there is none.
  FL_FN static void of_columns(const void* array, int64_t column, int64_t columns, R* to) {
    for (int64_t j = 0; j < kTile; ++j)
      to[j] = array && j < columns ? static_cast<const R*>(array)[column + j] : R(0);
  }
  static void pad(R* s, int64_t rows, int64_t columns, R value) {
    for (int64_t j = columns; j % W; ++j)
      for (int64_t r = 0; r < rows; ++r) s[r * kTile + j] = value;
  }
  // What counts nothing becomes -infinity, the marked entry too; positives go where they are wanted.
  FL_NOINLINE void sort_out(R* s, int64_t column, int64_t columns, R* positive) const {
    pad(s, rows_, columns, kNone);
    if (!a_.mark && !a_.row_ids) return;
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      const int64_t at = marked(r, column, columns);
      const R kept = at >= 0 ? s[at] : R(0);
      if (a_.row_ids && !a_.same_is_positive) {
        for (int64_t j = 0; j < columns; j += W)
          store(s + j, select(same(r, column + j), fill<F>(kNone), load(s + j)));
      } else if (a_.row_ids && (positive || !a_.with_positives)) {
        F sum{};
        if (at >= 0) s[at] = 0;
        for (int64_t j = 0; j < columns; j += W) {
          const auto mine = same(r, column + j);
          sum += select(mine, load(s + j), F{});
          if (!a_.with_positives) store(s + j, select(mine, fill<F>(kNone), load(s + j)));
        }
        if (positive) positive[r] += horizontal_sum(sum);
      }
      if (at < 0) continue;
      s[at] = kNone;
      if (positive && !a_.same_is_positive) positive[r] = kept;
    }
  }
  FL_FN static F nothing_is_zero(F m) { return select(m == kNone, F{}, m); }

  const cpu::TileCall& a_;
  int64_t row_ = 0, rows_ = 0;
  R* array_[kArrays];
};

template <class R, TilePass kPass>
class TileEpilogue;

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
    this->sort_out(s, column, columns, a_.positive ? this->of_rows(a_.positive) : nullptr);
    a_.col_max ? rows_and_columns(s, columns) : rows_alone(s, columns);
    const R *const top = array_[2], *const sum = array_[3];
    for (int64_t i = 0; i < kTile; i += W) {
      const F m = max(load(top + i), load(m_ + i)), b = Base::nothing_is_zero(m);
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
      sum = merged_sum(sum, m, load(array_[5] + j), load(col_base_ + j), Base::nothing_is_zero(merged));
      m = last ? Base::nothing_is_zero(merged) : merged;
      put(to_m, m, count);
      put(to_s, last ? log(sum) : sum, count);
    }
  }

  void end_rows() {
    if (!a_.row_max) return;
    for (int64_t r = 0; r < rows_; r += W) {
      put(this->of_rows(a_.row_max) + r, Base::nothing_is_zero(load(m_ + r)), rows_ - r);
      put(this->of_rows(a_.row_log_sum) + r, log(load(sum_ + r)), rows_ - r);
    }
  }

 private:
  FL_FN static F get(const R* p, int64_t count, R rest) {
    return count >= W ? load(p) : load_part(p, count, rest);
  }
  FL_FN static void put(R* p, F v, int64_t count) { count >= W ? store(p, v) : store_part(p, v, count); }
  FL_NOINLINE void rows_alone(const R* s, int64_t columns) {
    R *const top = array_[2], *const sum = array_[3];
    for (int64_t r = 0; r < kTile; ++r) top[r] = kNone, sum[r] = base_[r] = 0;
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      F m = fill<F>(kNone), total{};
      for (int64_t j = 0; j < columns; j += W) m = max(load(s + j), m);
      top[r] = horizontal_max(m);
      base_[r] = top[r] == kNone ? R(0) : top[r];
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
        store(base_ + i, Base::nothing_is_zero(load(top + i)));
        store(col_base_ + i, Base::nothing_is_zero(load(col_top + i)));
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

  // factors of rows in array 0 and of columns in array 1 that multiply exp(s - base), if one base serves all
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
  // s becomes the softmax's gradient; `rest` may change a vector of it
  template <class Rest>
  FL_FN void gradient(R* s, int64_t column, int64_t columns, Rest rest) const {
    const R *row_max = static_cast<const R*>(a_.row_max) + row_,
            *row_sum = static_cast<const R*>(a_.row_log_sum) + row_,
            *row_grad = static_cast<const R*>(a_.row_grad) + row_;
    if (!a_.col_grad) {  // nothing of other rows
      for (int64_t r = 0; r < rows_; ++r)
        for (int64_t j = 0; j < columns; j += W) {
          R* const at = s + r * kTile + j;
          const F v = load(at);
          const F g = a_.row_grad ? row_grad[r] * softmax_share(v, row_max[r], row_sum[r]) : F{};
          store(at, rest(v, g, r, j));
        }
      return;
    }
    R base;
    if (one_base(column, columns, base)) {
      for (int64_t r = 0; r < rows_; ++r)
        for (int64_t j = 0; j < columns; j += W) {
          R* const at = s + r * kTile + j;
          const F v = load(at);
          store(at, rest(v, exp_down(v - base) * (load(array_[1] + j) + array_[0][r]), r, j));
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
        if (a_.row_grad) g += row_grad[r] * softmax_share(v, row_max[r], row_sum[r]);
        store(at, rest(v, g, r, j));
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
    this->sort_out(s, column, columns, nullptr);
    const R* const up = a_.positive_grad ? this->of_rows(a_.positive_grad) : nullptr;
    if (up && a_.same_is_positive) {
      this->gradient(s, column, columns, [&](F, F g, int64_t r, int64_t j) {
        return g + select(this->same(r, column + j), load(col_up + j) + up[r], F{});
      });
    } else {
      this->gradient(s, column, columns, [](F, F g, int64_t, int64_t) { return g; });
    }
    for (int64_t r = 0; a_.mark && r < rows_; ++r) {
      const int64_t at = this->marked(r, column, columns);
      if (at >= 0) s[r * kTile + at] = up && !a_.same_is_positive ? up[r] + col_up[at] : R(0);
    }
    Base::pad(s, rows_, columns, 0);
  }
};

// ---- softplus over the positives
template <class R>
class TileEpilogue<R, TilePass::pairs> : public TileRows<R> {
  using Base = TileRows<R>;
  using Base::a_, Base::rows_, Base::row_, Base::kTile, Base::W;
  using typename Base::F;

 public:
  using Base::Base;
  void begin_rows(int64_t row, int64_t rows) {
    Base::begin_rows(row, rows);
    for (int64_t r = 0; r < rows; ++r) this->of_rows(a_.positive)[r] = this->of_rows(a_.row_grad)[r] = 0;
  }
  FL_NOINLINE void tile(R* s, int64_t column, int64_t columns) {
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      const R m = this->of_rows(a_.row_max)[r], log_sum = this->of_rows(a_.row_log_sum)[r];
      Base::pad(s, 1, columns, 0);
      const int64_t at = this->marked(r, column, columns);
      F value{}, slopes{};
      for (int64_t j = 0; j < columns; j += W) {
        auto mine = this->same(r, column + j);
        if (at >= j && at < j + W) mine[at - j] = 0;
        if (!any(mine)) continue;
        F slope;
        value += select(mine, softplus((m - load(s + j)) + log_sum, slope), F{});
        slopes += select(mine, slope, F{});
      }
      this->of_rows(a_.positive)[r] += horizontal_sum(value);
      this->of_rows(a_.row_grad)[r] += horizontal_sum(slopes);
    }
  }
};

template <class R>
class TileEpilogue<R, TilePass::pairs_gradient> : public SoftmaxGradient<R> {
  using Base = SoftmaxGradient<R>;
  using Base::a_, Base::array_, Base::rows_, Base::kTile, Base::W;
  using typename Base::F;

 public:
  using Base::Base;
  FL_NOINLINE void tile(R* s, int64_t column, int64_t columns) {
    R *const col_up = array_[4], *const col_m = array_[5], *const col_log_sum = array_[6];
    this->of_columns(a_.col_positive_grad, column, columns, col_up);
    this->of_columns(a_.col_max, column, columns, col_m);
    this->of_columns(a_.col_log_sum, column, columns, col_log_sum);
    Base::pad(s, rows_, columns, -INFINITY);
    const R *const m = this->of_rows(a_.row_max), *const log_sum = this->of_rows(a_.row_log_sum),
                   *const up = this->of_rows(a_.positive_grad);
    this->gradient(s, column, columns, [&](F v, F g, int64_t r, int64_t j) {
      const auto mine = this->same(r, column + j);
      if (!any(mine)) return g;
      F slope;
      softplus((m[r] - v) + log_sum[r], slope);
      F drawn = up[r] * slope;
      if (a_.col_positive_grad) {
        softplus((load(col_m + j) - v) + load(col_log_sum + j), slope);
        drawn += load(col_up + j) * slope;
      }
      return select(mine, -drawn, g);
    });
    for (int64_t r = 0; a_.mark && r < rows_; ++r) {
      const int64_t at = this->marked(r, column, columns);
      if (at >= 0) s[r * kTile + at] = 0;
    }
    Base::pad(s, rows_, columns, 0);
  }
};

// ---- softplus over all, of -s for the marked entry
template <class R>
class TileEpilogue<R, TilePass::sigmoid> : public TileRows<R> {
  using Base = TileRows<R>;
  using Base::a_, Base::rows_, Base::kTile, Base::W, Base::kNone;
  using typename Base::F;
  double value_[cpu::kTile], slope_[cpu::kTile];

 public:
  using Base::Base;
  void begin_rows(int64_t row, int64_t rows) {
    Base::begin_rows(row, rows);
    for (int64_t r = 0; r < rows; ++r) value_[r] = slope_[r] = 0;
  }
  FL_NOINLINE void tile(R* s, int64_t column, int64_t columns) {
    R* const kept = this->array_[0];
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t at = this->marked(r, column, columns);
      kept[r] = at >= 0 ? s[r * kTile + at] + R(a_.bias) : R(0);
    }
    this->sort_out(s, column, columns, nullptr);
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      const R up = a_.row_grad ? this->of_rows(a_.row_grad)[r] : R(0);
      F value{}, slopes{};
      for (int64_t j = 0; j < columns; j += W) {
        F slope;
        value += softplus(load(s + j) + R(a_.bias), slope);
        slopes += slope;
        store(s + j, slope * up);
      }
      value_[r] += horizontal_sum(value);
      slope_[r] += horizontal_sum(slopes);
      const int64_t at = this->marked(r, column, columns);
      if (at < 0) continue;
      F slope;
      value_[r] += softplus(fill<F>(-kept[r]), slope)[0];
      slope_[r] -= slope[0];
      s[at] = -slope[0] * up;
    }
  }
  void end_rows() {
    for (int64_t r = 0; r < rows_; ++r) {
      this->of_rows(a_.positive)[r] = R(value_[r]);
      if (a_.row_log_sum) this->of_rows(a_.row_log_sum)[r] = R(slope_[r]);
    }
  }
};

// ---- the extremes of a row among its positives and among its negatives; NaN is the most extreme
template <class R>
class TileEpilogue<R, TilePass::hardest> : public TileRows<R> {
  using Base = TileRows<R>;
  using Base::a_, Base::array_, Base::row_, Base::rows_, Base::kTile;

 public:
  using Base::Base;
  void begin_rows(int64_t row, int64_t rows) {
    Base::begin_rows(row, rows);
    for (int64_t r = 0; r < rows; ++r) {
      array_[0][r] = -INFINITY, array_[1][r] = INFINITY;
      a_.hardest[row + r] = a_.hardest[a_.m + row + r] = -1;
    }
  }
  FL_NOINLINE void tile(R* s, int64_t column, int64_t columns) {
    const R* const add = static_cast<const R*>(a_.col_max) + column;
    const R* const ids = static_cast<const R*>(a_.col_ids) + column;
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      const int64_t at = this->marked(r, column, columns);
      const R mine = static_cast<const R*>(a_.row_ids)[row_ + r];
      R most = array_[0][r], least = array_[1][r];
      int64_t *const positive = a_.hardest + row_ + r, *const negative = positive + a_.m;
      for (int64_t j = 0; j < columns; ++j) {
        const R key = s[j] + add[j];
        if (ids[j] == mine) {
          if (j != at && (key > most || key != key || *positive < 0)) most = key, *positive = column + j;
        } else if (key < least || key != key || *negative < 0) {
          least = key, *negative = column + j;
        }
      }
      array_[0][r] = most, array_[1][r] = least;
    }
  }
};

}  // namespace fastloss::inline FL_ISA
