// Losses of a ranking of n items by rewards r and ranks k, smaller being better; all pairs are compared in
// registers, nothing of n x n is stored. With d = r_j - r_i, item i gives
//   bradley_terry   sum over j ranked behind i of log(1 + e^d), to be divided by the number of such pairs
//   plackett_luce   log(1 + sum over j ranked behind i of e^d), the normalizer N_i of i: -log p of being next
// A rank of NaN is behind nothing and before nothing: the item is not compared.
//
// `row` gives F reward(j), rank(j), normalizer(j): an item of one row, or on the CPU of several rows at once.
#pragma once
#include <cstdint>

#include "../drivers/names.h"
#include "../math/dtype.h"
#include "../math/math.h"
#include "elementwise.h"

namespace fastloss {

FL_ENUM(Ranking, bradley_terry, plackett_luce)

// The arguments of the ranking kernels, on CPU and CUDA alike. Plain data: no torch.
struct RankingArgs {
  Ranking kind;
  bool backward;
  DType dtype;      // of rewards and their gradient
  int64_t rows, n;  // [rows, n], contiguous
  const void* rewards;
  const void* ranks;     // in the accumulation type; NaN: not ranked
  void *loss, *pairs;    // [rows] in the accumulation type: forward's results
  void* state;           // [rows, state_width] in it: what backward needs
  const void* upstream;  // backward: [rows] in it
  void* gradient;        // backward: [rows, n]

  // The number of pairs of a row; for plackett_luce the n normalizers come before it.
  FL_FN int64_t state_width() const { return kind == Ranking::plackett_luce ? n + 1 : 1; }
};

}  // namespace fastloss

namespace fastloss::inline FL_ISA {

template <class F>
struct RankedItem {
  F value, pairs;
};

// The factor of a row's sum over its items: bradley_terry takes the mean over the pairs.
template <class F>
FL_FN F loss_weight(Ranking kind, F pairs) {
  return kind == Ranking::plackett_luce ? F{} + 1 : 1 / select(pairs > 0, pairs, F{} + 1);
}

template <class F, class Row>
FL_FN RankedItem<F> pairs_of_item(const Row& row, int64_t n, int64_t i) {
  const F r = row.reward(i), k = row.rank(i), zero{};
  RankedItem<F> item{};
  for (int64_t j = 0; j < n; ++j) {
    const auto behind = row.rank(j) > k;
    const F d = row.reward(j) - r, l = log1p_unit(exp(-abs(d))) + max(d, zero);
    item.value += select(behind, l, zero);
    item.pairs += select(behind, zero + 1, zero);
  }
  return item;
}
template <class F, class Row>
FL_FN F pairs_gradient(const Row& row, int64_t n, int64_t i) {
  const F r = row.reward(i), k = row.rank(i), zero{};
  F sum{};
  for (int64_t j = 0; j < n; ++j) {
    const F other = row.rank(j), d = row.reward(j) - r, e = exp(-abs(d)), small = e / (1 + e),
            big = 1 / (1 + e);
    const F up = select(d > 0, big, small), down = select(d > 0, small, big);  // sigmoid(d), sigmoid(-d)
    sum += select(other > k, -up, select(other < k, down, zero));
  }
  return sum;
}

template <class F, class Row>
FL_FN RankedItem<F> choice_of_item(const Row& row, int64_t n, int64_t i) {
  const F r = row.reward(i), k = row.rank(i), zero{};
  F top{}, pairs{};
  for (int64_t j = 0; j < n; ++j) {
    const auto behind = row.rank(j) > k;
    top = select(behind, max(row.reward(j) - r, top), top);
    pairs += select(behind, zero + 1, zero);
  }
  F others{};  // relative to top; item i itself is e^-top
  for (int64_t j = 0; j < n; ++j) others += select(row.rank(j) > k, exp((row.reward(j) - r) - top), zero);
  return {top + log1p(others + expm1(-top)), pairs};
}
template <class F, class Row>
FL_FN F choice_gradient(const Row& row, int64_t n, int64_t i) {
  const F r = row.reward(i), k = row.rank(i), zero{};
  F sum = expm1(-row.normalizer(i));  // p - 1 of being next itself; of what is not ranked 0
  for (int64_t j = 0; j < n; ++j)
    sum += select(row.rank(j) < k, exp((r - row.reward(j)) - row.normalizer(j)), zero);
  return sum;
}

}  // namespace fastloss::inline FL_ISA
