// The pass `statistics` over a block: maxima and sums of exponentials of rows and columns, by bands and
// spans, which a second kernel merges.
#pragma once
#include "../../math/online_softmax.h"
#include "similarity_block.cuh"

namespace fastloss::cuda::similarity {

constexpr int kMergeThreads = 256;

// TileChunk::part: for each span the rows' maxima, sums of exponentials and sums of positives [spans, rows];
// for each band the columns' maxima and sums [bands, cols].
template <class R>
struct Parts {
  R *row_max, *row_sum, *row_positive, *col_max, *col_sum;
  __device__ __forceinline__ Parts(const TileChunk& a, int64_t spans, int64_t bands) {
    row_max = static_cast<R*>(a.part);
    row_sum = row_max + spans * a.rows;
    row_positive = row_sum + spans * a.rows;
    col_max = row_positive + spans * a.rows;
    col_sum = col_max + bands * a.cols;
  }
};

template <class R, bool kIds>
__global__ void __launch_bounds__(kWarps * 32) statistics_kernel(TileChunk a, int band) {
  using T = Cut<R, kIds ? 2 : 4>;
  constexpr int kColumns = T::kColumns;
  const Chunk<R> c(a);
  const int first = T::first(), left = static_cast<int>(a.cols) - first, warp = threadIdx.x / 32;
  const int64_t begin = int64_t{blockIdx.x} * band;
  const int count = a.rows - begin < band ? static_cast<int>(a.rows - begin) : band;
  const bool target_counts = c.summed(c.entry(true, false));
  FL_SHARED(R, tops, kWarps * kBand);
  FL_SHARED(R, sums, kWarps * kBand);
  FL_SHARED(R, positives, kWarps * kBand);

  OnlineSoftmax<R> column[kColumns];
  int64_t id[kIds ? kColumns : 1];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    if constexpr (kIds) id[k] = T::offset(k) < left ? a.col_ids[a.col + first + T::offset(k)] : 0;
  }
  for (int r = 0; r < count; r += 2) {
    R v[2][kColumns], top[2], sum[2], positive[2] = {0, 0};
#pragma unroll
    for (int q = 0; q < 2; ++q) T::load(c.row(begin + r + q) + first, left, r + q < count, v[q]);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int last = r + q < count ? left : 0;
      const int target = r + q < count ? c.target_col(begin + r + q) - first : -1;
      const int64_t row_id = kIds && r + q < count ? a.row_ids[a.row + begin + r + q] : 0;
      top[q] = -INFINITY;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        bool counts = T::offset(k) < last;
        const R x = c.value(v[q][k]);
        if constexpr (kIds) {
          const Entry e = c.entry(T::offset(k) == target, id[k] == row_id);
          if (counts && e == Entry::positive) positive[q] += x;
          counts = counts && c.summed(e);
        } else {
          counts = counts && (T::offset(k) != target || target_counts);
        }
        v[q][k] = counts ? x : R(-INFINITY);
        top[q] = max(top[q], v[q][k]);
      }
    }
    warp_reduce_all(top, [](R mine, R other) { return max(mine, other); });  // another's NaN stays
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const R base = softmax_base(top[q]);
      sum[q] = 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) sum[q] += exp(v[q][k] - base);
      sum[q] = warp_sum(sum[q]);
      if constexpr (kIds) positive[q] = warp_sum(positive[q]);
      if (threadIdx.x % 32 == 0 && r + q < count) {
        tops[warp * kBand + r + q] = top[q];
        sums[warp * kBand + r + q] = sum[q];
        if constexpr (kIds) positives[warp * kBand + r + q] = positive[q];
      }
    }
    if (!a.col_max) continue;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) column[k].push_two(v[0][k], v[1][k]);
  }
  __syncthreads();
  const Parts<R> part(a, gridDim.y, gridDim.x);
  const int warps = blockDim.x / 32;
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    const int64_t to = blockIdx.y * a.rows + begin + r;
    OnlineSoftmax<R> row;
    R positive = 0;
    for (int w = 0; w < warps; ++w) row.top = max(row.top, tops[w * kBand + r]);
    for (int w = 0; w < warps; ++w) {
      row.add(tops[w * kBand + r], sums[w * kBand + r]);
      if constexpr (kIds) positive += positives[w * kBand + r];
    }
    part.row_max[to] = row.top;
    part.row_sum[to] = row.sum;
    if constexpr (kIds) part.row_positive[to] = positive;
  }
  if (!a.col_max) return;
#pragma unroll
  for (int k = 0; k < kColumns; ++k)
    if (T::offset(k) < left) {
      const int64_t to = blockIdx.x * a.cols + first + T::offset(k);
      part.col_max[to] = column[k].top;
      part.col_sum[to] = column[k].sum;
    }
}

// A block takes 32 rows, or 32 columns, with eight threads for the partial results of each. The blocks of
// rows come first.
template <class R>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(TileChunk a, int64_t spans, int64_t bands) {
  constexpr int kGroups = kMergeThreads / 32;
  const Chunk<R> c(a);
  const Parts<R> part(a, spans, bands);
  const int64_t row_blocks = (a.rows + 31) / 32;
  const bool is_row = blockIdx.x < row_blocks;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t k = (is_row ? blockIdx.x : blockIdx.x - row_blocks) * 32 + lane;
  const int64_t count = is_row ? a.rows : a.cols, parts = is_row ? spans : bands;
  const R* const max_of = is_row ? part.row_max : part.col_max;
  const R* const sum_of = is_row ? part.row_sum : part.col_sum;
  const bool add_positives = is_row && a.positive && a.row_ids && a.labels_are_positives;
  FL_SHARED(R, tops, kMergeThreads);
  FL_SHARED(R, sums, kMergeThreads);
  FL_SHARED(R, positives, kMergeThreads);
  OnlineSoftmax<R> mine;
  R positive = 0;
  if (k < count) {
#pragma unroll 4
    for (int64_t p = group; p < parts; p += kGroups) mine.top = max(mine.top, max_of[p * count + k]);
#pragma unroll 4
    for (int64_t p = group; p < parts; p += kGroups) mine.add(max_of[p * count + k], sum_of[p * count + k]);
    if (add_positives)
      for (int64_t p = group; p < parts; p += kGroups) positive += part.row_positive[p * count + k];
  }
  tops[threadIdx.x] = mine.top;
  sums[threadIdx.x] = mine.sum;
  positives[threadIdx.x] = positive;
  __syncthreads();
  if (group || k >= count) return;
  void* const top_to = is_row ? a.row_max : a.col_max;
  void* const sum_to = is_row ? a.row_log_sum : a.col_log_sum;
  const int64_t to = (is_row ? a.row : a.col) + k;
  const bool begun = is_row ? a.col > 0 : a.row > 0;
  const bool last = is_row ? a.col + a.cols == a.n : a.row + a.rows == a.m;
  const R former = begun && top_to ? c.at(top_to, to) : R(-INFINITY);
  OnlineSoftmax<R> all{former, 0};
  for (int g = 0; g < kGroups; ++g) all.top = max(all.top, tops[g * 32 + lane]);
  all.sum = begun && top_to ? c.at(sum_to, to) * exp(former - all.base()) : R(0);
  for (int g = 0; g < kGroups; ++g) all.add(tops[g * 32 + lane], sums[g * 32 + lane]);
  if (top_to) {
    c.at(top_to, to) = last ? all.base() : all.top;
    c.at(sum_to, to) = last ? all.log_sum() : all.sum;
  }
  if (!is_row || !a.positive) return;
  positive = begun ? c.at(a.positive, to) : R(0);
  if (add_positives) {
    for (int g = 0; g < kGroups; ++g) positive += positives[g * 32 + lane];
  } else if (!a.labels_are_positives) {
    const int target = c.target_col(k);
    if (target >= 0) positive += c.value(c.row(k)[target]);
  }
  c.at(a.positive, to) = positive;
}

}  // namespace fastloss::cuda::similarity
