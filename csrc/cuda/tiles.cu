// Passes over a chunk of a matrix of similarities: a block a row for what rows add up, a thread a column for
// what columns do, a thread an element for gradients in place. Rows are summed in an order that depends on
// their length alone, columns row by row, from chunk to chunk.
#include "start.cuh"
// after vector.cuh: port.cuh decides what __device__ means
#include "../losses/contrastive.h"
#include "launchers.h"

namespace fastloss::cuda {
namespace {

constexpr int kRowThreads = 128, kElementThreads = 128;

enum class Entry { left_out, positive, negative };

template <class R>
struct Chunk {
  const TileChunk& a;
  __device__ __forceinline__ Entry entry(int64_t i, int64_t j) const {
    if (a.mark && a.mark[i] == j) return a.same_is_positive ? Entry::left_out : Entry::positive;
    if (!a.row_ids || a.row_ids[i] != a.col_ids[j]) return Entry::negative;
    return a.same_is_positive ? Entry::positive : Entry::left_out;
  }
  __device__ __forceinline__ bool summed(Entry e) const {
    return e == Entry::negative || (e == Entry::positive && a.with_positives);
  }
  __device__ __forceinline__ R& s(int64_t r, int64_t j) const { return static_cast<R*>(a.s)[r * a.n + j]; }
  __device__ __forceinline__ static R& at(void* array, int64_t i) { return static_cast<R*>(array)[i]; }
  __device__ __forceinline__ static R at(const void* array, int64_t i) {
    return static_cast<const R*>(array)[i];
  }
};

// A running maximum and the sum of exponentials relative to it.
template <class R>
struct Sum {
  R m = -INFINITY, sum = 0;
  __device__ __forceinline__ R base() const { return m == -INFINITY ? R(0) : m; }
  __device__ __forceinline__ void merge(const Sum& o) {
    const R high = max(o.m, m), b = high == -INFINITY ? R(0) : high;
    sum = merged_sum(sum, base(), o.sum, o.base(), b);
    m = high;
  }
  __device__ __forceinline__ void add(R v) {
    if (v > m) {
      sum = m == -INFINITY ? sum : sum * exp(m - v);
      m = v;
    }
    sum += exp(v - base());
  }
};

// What a row adds up in one pass: the sum of exponentials, or two sums, or two extremes with their places.
template <class R>
struct RowSums {
  Sum<R> lse;
  R first = 0, second = 0;
  __device__ __forceinline__ void merge(const RowSums& o) {
    lse.merge(o.lse);
    first += o.first;
    second += o.second;
  }
};
template <class R>
struct Extremes {
  R most = -INFINITY, least = INFINITY;
  int64_t positive = -1, negative = -1;
  __device__ __forceinline__ void take_positive(R key, int64_t j) {
    const bool more = positive < 0 || key > most || key != key || (key == most && j < positive);
    if (j >= 0 && more) most = key, positive = j;
  }
  __device__ __forceinline__ void take_negative(R key, int64_t j) {
    const bool less = negative < 0 || key < least || key != key || (key == least && j < negative);
    if (j >= 0 && less) least = key, negative = j;
  }
  __device__ __forceinline__ void merge(const Extremes& o) {
    take_positive(o.most, o.positive);
    take_negative(o.least, o.negative);
  }
};

// The threads' parts joined in a tree; thread 0 gets the whole.
template <class S>
__device__ __forceinline__ S joined(S mine) {
  FL_SHARED(S, part, kRowThreads);
  part[threadIdx.x] = mine;
  for (int width = kRowThreads / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) {
      S whole = part[threadIdx.x];
      whole.merge(part[threadIdx.x + width]);
      part[threadIdx.x] = whole;
    }
  }
  return part[threadIdx.x];
}

template <class R>
__global__ void __launch_bounds__(kRowThreads, 8) statistics_kernel(TileChunk a) {
  const Chunk<R> c{a};
  const int64_t r = blockIdx.x, i = a.row + r;
  RowSums<R> sums;
  for (int64_t j = threadIdx.x; j < a.n; j += kRowThreads) {
    const Entry e = c.entry(i, j);
    const R v = c.s(r, j);
    if (c.summed(e)) sums.lse.add(v);
    if (e == Entry::positive) sums.first += v;
  }
  sums = joined(sums);
  if (threadIdx.x) return;
  if (a.row_max) {
    c.at(a.row_max, i) = sums.lse.base();
    c.at(a.row_log_sum, i) = log(sums.lse.sum);
  }
  if (a.positive) c.at(a.positive, i) = sums.first;
}

template <class R>
__global__ void __launch_bounds__(kElementThreads) columns_kernel(TileChunk a) {
  const Chunk<R> c{a};
  const int64_t j = int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (j >= a.n) return;
  Sum<R> sum;
  if (a.row > 0) {
    sum.m = c.at(a.col_max, j);
    sum.sum = c.at(a.col_log_sum, j);
  }
  for (int64_t r = 0; r < a.rows; ++r)
    if (c.summed(c.entry(a.row + r, j))) sum.add(c.s(r, j));
  const bool last = a.row + a.rows == a.m;
  c.at(a.col_max, j) = last ? sum.base() : sum.m;
  c.at(a.col_log_sum, j) = last ? log(sum.sum) : sum.sum;
}

template <class R>
__global__ void __launch_bounds__(kRowThreads, 8) pairs_kernel(TileChunk a) {
  const Chunk<R> c{a};
  const int64_t r = blockIdx.x, i = a.row + r;
  const R m = c.at(a.row_max, i), log_sum = c.at(a.row_log_sum, i);
  RowSums<R> sums;
  for (int64_t j = threadIdx.x; j < a.n; j += kRowThreads) {
    if (c.entry(i, j) != Entry::positive) continue;
    R slope;
    sums.first += softplus((m - c.s(r, j)) + log_sum, slope);
    sums.second += slope;
  }
  sums = joined(sums);
  if (threadIdx.x) return;
  c.at(a.positive, i) = sums.first;
  c.at(a.row_grad, i) = sums.second;
}

template <class R>
__global__ void __launch_bounds__(kRowThreads, 8) sigmoid_kernel(TileChunk a) {
  const Chunk<R> c{a};
  const int64_t r = blockIdx.x, i = a.row + r;
  const R up = a.row_grad ? c.at(a.row_grad, i) : R(0);
  RowSums<R> sums;
  for (int64_t j = threadIdx.x; j < a.n; j += kRowThreads) {
    const Entry e = c.entry(i, j);
    const R v = c.s(r, j), sign = e == Entry::positive ? R(-1) : R(1);
    R slope = 0;
    if (e != Entry::left_out) {
      sums.first += softplus(sign * v, slope);
      slope *= sign;
      sums.second += slope;
    }
    if (a.row_grad) c.s(r, j) = slope * up;
  }
  sums = joined(sums);
  if (threadIdx.x) return;
  c.at(a.positive, i) = sums.first;
  if (a.row_log_sum) c.at(a.row_log_sum, i) = sums.second;
}

template <class R>
__global__ void __launch_bounds__(kRowThreads, 8) hardest_kernel(TileChunk a) {
  const Chunk<R> c{a};
  const int64_t r = blockIdx.x, i = a.row + r;
  Extremes<R> x;
  for (int64_t j = threadIdx.x; j < a.n; j += kRowThreads) {
    const Entry e = c.entry(i, j);
    const R key = c.s(r, j) + c.at(a.col_max, j);
    if (e == Entry::positive) x.take_positive(key, j);
    if (e == Entry::negative) x.take_negative(key, j);
  }
  x = joined(x);
  if (threadIdx.x) return;
  a.hardest[i] = x.positive;
  a.hardest[a.m + i] = x.negative;
}

// softmax_gradient and pairs_gradient
template <class R>
__global__ void __launch_bounds__(kElementThreads) gradient_kernel(TileChunk a) {
  const Chunk<R> c{a};
  const int64_t at = int64_t{blockIdx.x} * kElementThreads + threadIdx.x, r = at / a.n, j = at % a.n;
  if (r >= a.rows) return;
  const int64_t i = a.row + r;
  const Entry e = c.entry(i, j);
  const R v = c.s(r, j);
  R g = 0;
  if (c.summed(e)) {
    if (a.row_grad) g += c.at(a.row_grad, i) * softmax_share(v, c.at(a.row_max, i), c.at(a.row_log_sum, i));
    if (a.col_grad) g += c.at(a.col_grad, j) * softmax_share(v, c.at(a.col_max, j), c.at(a.col_log_sum, j));
  }
  if (e == Entry::positive && a.positive_grad) {
    const auto drawn = [&](R up, const void* top, const void* log_sum, int64_t k) {
      R slope = -1;
      if (a.pass == TilePass::pairs_gradient) softplus((c.at(top, k) - v) + c.at(log_sum, k), slope);
      return up * slope;
    };
    g -= drawn(c.at(a.positive_grad, i), a.row_max, a.row_log_sum, i);
    if (a.col_positive_grad) g -= drawn(c.at(a.col_positive_grad, j), a.col_max, a.col_log_sum, j);
  }
  c.s(r, j) = g;
}

template <class R>
void run(const TileChunk& a, cudaStream_t stream) {
  const auto blocks = [](int64_t n) { return (n + kElementThreads - 1) / kElementThreads; };
  switch (a.pass) {
    case TilePass::statistics:
      start<&statistics_kernel<R>>(a.rows, kRowThreads, 0, stream, a);
      if (a.col_max) start<&columns_kernel<R>>(blocks(a.n), kElementThreads, 0, stream, a);
      return;
    case TilePass::pairs:
      return start<&pairs_kernel<R>>(a.rows, kRowThreads, 0, stream, a);
    case TilePass::sigmoid:
      return start<&sigmoid_kernel<R>>(a.rows, kRowThreads, 0, stream, a);
    case TilePass::hardest:
      return start<&hardest_kernel<R>>(a.rows, kRowThreads, 0, stream, a);
    case TilePass::softmax_gradient:
    case TilePass::pairs_gradient:
      return start<&gradient_kernel<R>>(blocks(a.rows * a.n), kElementThreads, 0, stream, a);
  }
}

}  // namespace

void tile_chunk(const TileChunk& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  a.wide ? run<double>(a, s) : run<float>(a, s);
}

}  // namespace fastloss::cuda
