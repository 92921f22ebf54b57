// The rarer passes over a block, with a thread block for each row; and the sums over a row's spans.
#pragma once
#include "similarity_block.cuh"

namespace fastloss::cuda::similarity {

constexpr int kRowThreads = 128;

// Two sums over a row.
template <class R>
struct RowSums {
  R first = 0, second = 0;
  __device__ __forceinline__ void merge(const RowSums& o) {
    first += o.first;
    second += o.second;
  }
};
// The hardest positive, with the largest key, and the hardest negative, with the smallest; and their columns.
template <class R>
struct Extremes {
  R max_key = -INFINITY, min_key = INFINITY;
  int64_t positive = -1, negative = -1;
  __device__ __forceinline__ void take_positive(R key, int64_t j) {
    const bool more = positive < 0 || key > max_key || key != key || (key == max_key && j < positive);
    if (j >= 0 && more) max_key = key, positive = j;
  }
  __device__ __forceinline__ void take_negative(R key, int64_t j) {
    const bool less = negative < 0 || key < min_key || key != key || (key == min_key && j < negative);
    if (j >= 0 && less) min_key = key, negative = j;
  }
  __device__ __forceinline__ void merge(const Extremes& o) {
    take_positive(o.max_key, o.positive);
    take_negative(o.min_key, o.negative);
  }
};

template <class R>
__global__ void __launch_bounds__(kRowThreads, 8) pairs_kernel(TileChunk a) {
  const Chunk<R> c(a);
  const int64_t r = blockIdx.x, i = a.row + r;
  const R m = c.at(a.row_max, i), log_sum = c.at(a.row_log_sum, i);
  const int target = c.target_col(r);
  const int64_t row_id = a.row_ids ? a.row_ids[i] : 0;
  RowSums<R> sums;
  for (int j = threadIdx.x; j < a.cols; j += kRowThreads) {
    if (c.entry(j == target, a.row_ids && a.col_ids[a.col + j] == row_id) != Entry::positive) continue;
    R slope;
    sums.first += softplus((m - c.value(c.row(r)[j])) + log_sum, slope);
    sums.second += slope;
  }
  sums = block_merge_tree<kRowThreads>(sums);
  if (threadIdx.x) return;
  c.at(a.pairs_loss(), i) = (a.col ? c.at(a.pairs_loss(), i) : R(0)) + sums.first;
  c.at(a.pairs_slope(), i) = (a.col ? c.at(a.pairs_slope(), i) : R(0)) + sums.second;
}

// Here a block has all columns.
template <class R>
__global__ void __launch_bounds__(kRowThreads, 8) hardest_kernel(TileChunk a) {
  const Chunk<R> c(a);
  const int64_t r = blockIdx.x, i = a.row + r;
  const int target = c.target_col(r);
  const int64_t row_id = a.row_ids ? a.row_ids[i] : 0;
  Extremes<R> x;
  for (int j = threadIdx.x; j < a.cols; j += kRowThreads) {
    const Entry e = c.entry(j == target, a.row_ids && a.col_ids[j] == row_id);
    const R key = c.value(c.row(r)[j]) + c.at(a.hardest_offset(), j);
    if (e == Entry::positive) x.take_positive(key, j);
    if (e == Entry::negative) x.take_negative(key, j);
  }
  x = block_merge_tree<kRowThreads>(x);
  if (threadIdx.x) return;
  a.hardest[i] = x.positive;
  a.hardest[a.m + i] = x.negative;
}

// Sums over a row's spans: the arrays are set by the first block of columns and accumulate over the others.
template <class R>
__global__ void __launch_bounds__(kRowThreads) spans_kernel(TileChunk a, int64_t spans, bool sigmoid) {
  const int64_t r = int64_t{blockIdx.x} * kRowThreads + threadIdx.x, i = a.row + r;
  if (r >= a.rows) return;
  const auto add_up = [&](void* array, int place) {
    if (!array) return;
    R& to = Chunk<R>::at(array, i);
    R sum = a.col ? to : R(0);
    const R* const part = static_cast<const R*>(a.part) + place * spans * a.rows + r;
    for (int64_t p = 0; p < spans; ++p) sum += part[p * a.rows];
    to = sum;
  };
  if (sigmoid) {
    add_up(a.sigmoid_loss(), 0);
    add_up(a.sigmoid_slope(), 1);
  }
  add_up(a.dots, sigmoid ? 2 : 0);
}

}  // namespace fastloss::cuda::similarity
