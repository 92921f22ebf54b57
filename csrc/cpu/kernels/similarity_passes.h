// The epilogue of each pass for a tile of similarities, s[kTile][kTile], while it is in the cache.
//
// Called in this order for a block of rows: begin_rows, for each block of columns `tile` and, in the order
// of the blocks of rows, `columns`; then end_rows. Columns are padded to whole vectors with -infinity, or
// with zeros where the tile becomes a gradient.
#pragma once
#include "similarity_softmax.h"

namespace fastloss::inline FL_ISA {

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
    for (int64_t r = 0; r < rows; ++r)
      this->of_rows(a_.pairs_loss())[r] = this->of_rows(a_.pairs_slope())[r] = 0;
  }
  FL_NOINLINE void tile(R* s, int64_t column, int64_t columns) {
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      const R m = this->of_rows(a_.row_max)[r], log_sum = this->of_rows(a_.row_log_sum)[r];
      Base::pad(s, 1, columns, 0);
      const int64_t at = this->target_in_tile(r, column, columns);
      F value{}, slopes{};
      for (int64_t j = 0; j < columns; j += W) {
        auto mine = this->same(r, column + j);
        if (at >= j && at < j + W) mine[at - j] = 0;
        if (!any(mine)) continue;
        F slope;
        value += select(mine, softplus((m - load(s + j)) + log_sum, slope), F{});
        slopes += select(mine, slope, F{});
      }
      this->of_rows(a_.pairs_loss())[r] += horizontal_sum(value);
      this->of_rows(a_.pairs_slope())[r] += horizontal_sum(slopes);
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
    for (int64_t r = 0; a_.target_col && r < rows_; ++r) {
      const int64_t at = this->target_in_tile(r, column, columns);
      if (at >= 0) s[r * kTile + at] = 0;
    }
    Base::pad(s, rows_, columns, 0);
  }
};

// ---- softplus over all, of -s for the target
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
      const int64_t at = this->target_in_tile(r, column, columns);
      kept[r] = at >= 0 ? s[r * kTile + at] + R(a_.bias) : R(0);
    }
    this->mask_entries(s, column, columns, nullptr, {a_.labels_are_positives, false});
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
      const int64_t at = this->target_in_tile(r, column, columns);
      if (at < 0) continue;
      F slope;
      value_[r] += softplus(fill<F>(-kept[r]), slope)[0];
      slope_[r] -= slope[0];
      s[at] = -slope[0] * up;
    }
  }
  void end_rows() {
    for (int64_t r = 0; r < rows_; ++r) {
      this->of_rows(a_.sigmoid_loss())[r] = R(value_[r]);
      if (a_.sigmoid_slope()) this->of_rows(a_.sigmoid_slope())[r] = R(slope_[r]);
    }
  }
};

// ---- the extremes of a row among its positives and among its negatives; NaN counts as the most extreme
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
    const R* const add = static_cast<const R*>(a_.hardest_offset()) + column;
    const R* const ids = static_cast<const R*>(a_.col_ids) + column;
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      const int64_t at = this->target_in_tile(r, column, columns);
      const R mine = static_cast<const R*>(a_.row_ids)[row_ + r];
      R max_key = array_[0][r], min_key = array_[1][r];
      int64_t *const positive = a_.hardest + row_ + r, *const negative = positive + a_.m;
      for (int64_t j = 0; j < columns; ++j) {
        const R key = s[j] + add[j];
        if (ids[j] == mine) {
          if (j != at && (key > max_key || key != key || *positive < 0))
            max_key = key, *positive = column + j;
        } else if (key < min_key || key != key || *negative < 0) {
          min_key = key, *negative = column + j;
        }
      }
      array_[0][r] = max_key, array_[1][r] = min_key;
    }
  }
};

}  // namespace fastloss::inline FL_ISA
