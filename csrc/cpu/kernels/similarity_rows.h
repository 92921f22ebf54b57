// What the epilogues of a tile of similarities share: its rows and columns, and which entries count.
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

// If the maxima of a tile's rows and columns are at most this far apart, one base serves all of them, and an
// entry takes one exp instead of two.
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
  // The target column of row r relative to the tile, or -1 if it is in another tile.
  FL_FN int64_t target_in_tile(int64_t r, int64_t column, int64_t columns) const {
    const int64_t at = a_.target_col ? a_.target_col[row_ + r] - column : -1;
    return at >= 0 && at < columns ? at : -1;
  }
  FL_FN auto same(int64_t r, int64_t column) const {
    return load(static_cast<const R*>(a_.col_ids) + column) ==
           fill<F>(static_cast<const R*>(a_.row_ids)[row_ + r]);
  }
  // Copies the tile's part of a per-column array; zeros where there is none.
  FL_FN static void of_columns(const void* array, int64_t column, int64_t columns, R* to) {
    for (int64_t j = 0; j < kTile; ++j)
      to[j] = array && j < columns ? static_cast<const R*>(array)[column + j] : R(0);
  }
  static void pad(R* s, int64_t rows, int64_t columns, R value) {
    for (int64_t j = columns; j % W; ++j)
      for (int64_t r = 0; r < rows; ++r) s[r * kTile + j] = value;
  }
  FL_FN EntryRule rule() const { return {a_.labels_are_positives, a_.positives_in_denominator}; }
  // Entries that are not summed become -infinity. Positives go to positive[r], their sum if there are
  // several; null: not needed.
  FL_NOINLINE void mask_entries(R* s, int64_t column, int64_t columns, R* positive, EntryRule rule) const {
    pad(s, rows_, columns, kNone);
    if (!a_.target_col && !a_.row_ids) return;
    const Entry target_is = rule(true, false), equal_is = rule(false, true);
    const bool keep_target = rule.summed(target_is), keep_equal = rule.summed(equal_is);
    for (int64_t r = 0; r < rows_; ++r, s += kTile) {
      const int64_t at = target_in_tile(r, column, columns);
      const R target_s = at >= 0 ? s[at] : R(0);
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
      s[at] = keep_target ? target_s : kNone;
      if (positive && target_is == Entry::positive) positive[r] = target_s;
    }
  }

  const cpu::TileCall& a_;
  int64_t row_ = 0, rows_ = 0;
  R* array_[kArrays];
};

template <class R, TilePass kPass>
class TileEpilogue;

}  // namespace fastloss::inline FL_ISA
