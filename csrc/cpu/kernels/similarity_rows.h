// What the passes over a tile of similarities share: its rows and columns, and which entries count.
#pragma once
#include "../../losses/similarity.h"
#include "../../math/online_softmax.h"
#include "similarity.h"

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
  FL_FN EntryRule rule() const { return {a_.same_is_positive, a_.with_positives}; }
  // What is not summed becomes -infinity; positives go where they are wanted.
  FL_NOINLINE void mask_entries(R* s, int64_t column, int64_t columns, R* positive, EntryRule rule) const {
    pad(s, rows_, columns, kNone);
    if (!a_.mark && !a_.row_ids) return;
    const Entry marked_is = rule(true, false), equal_is = rule(false, true);
    const bool keep_marked = rule.summed(marked_is), keep_equal = rule.summed(equal_is);
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      const int64_t at = marked(r, column, columns);
      const R own = at >= 0 ? s[at] : R(0);
      if (a_.row_ids && equal_is == Entry::left_out) {
        for (int64_t j = 0; j < columns; j += W)
          store(s + j, select(same(r, column + j), fill<F>(kNone), load(s + j)));
      } else if (a_.row_ids && (positive || !keep_equal)) {
        F sum{};
        if (at >= 0) s[at] = 0;
        for (int64_t j = 0; j < columns; j += W) {
          const auto mine = same(r, column + j);
          sum += select(mine, load(s + j), F{});
          if (!keep_equal) store(s + j, select(mine, fill<F>(kNone), load(s + j)));
        }
        if (positive) positive[r] += horizontal_sum(sum);
      }
      if (at < 0) continue;
      s[at] = keep_marked ? own : kNone;
      if (positive && marked_is == Entry::positive) positive[r] = own;
    }
  }

  const cpu::TileCall& a_;
  int64_t row_ = 0, rows_ = 0;
  R* array_[kArrays];
};

template <class R, TilePass kPass>
class TileEpilogue;

}  // namespace fastloss::inline FL_ISA
