// Passes over a block of a matrix of similarities: bands of rows by spans of columns for what rows and
// columns add up and for gradients, and a second kernel that puts bands and spans together; a row each for
// what few losses ask. What is summed in which order, the shape of the block alone says.
#include "../../losses/similarity.h"
#include "../launch.cuh"
#include "../launchers.h"

namespace fastloss::cuda {
namespace {

constexpr int kRowThreads = 128, kMergeThreads = 256;
constexpr int kWarps = 8, kBand = 64;  // of a block at most: warps side by side, rows

enum class Entry { left_out, positive, negative };

// Rounded on their own, so that all passes see the same similarity.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float total(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double total(double a, double b) { return __dadd_rn(a, b); }

template <class R>
struct Chunk {
  const TileChunk& a;
  R scale, bias;
  __device__ __forceinline__ explicit Chunk(const TileChunk& chunk)
      : a(chunk), scale(at(a.scale_at, 0)), bias(a.bias_at ? at(a.bias_at, 0) : R(0)) {}

  __device__ __forceinline__ static R& at(void* array, int64_t i) { return static_cast<R*>(array)[i]; }
  __device__ __forceinline__ static R at(const void* array, int64_t i) {
    return static_cast<const R*>(array)[i];
  }
  // Rows and columns of the block.
  __device__ __forceinline__ const R* row(int64_t r) const {
    return static_cast<const R*>(a.s) + r * a.s_pitch;
  }
  __device__ __forceinline__ R value(R s) const { return total(product(s, scale), bias); }
  __device__ __forceinline__ int mark(int64_t r) const {
    if (!a.mark) return -1;
    const int64_t j = a.mark[a.row + r] - a.col;
    return j >= 0 && j < a.cols ? static_cast<int>(j) : -1;
  }
  // Of an entry that is marked or not and, if there are ids, of the same or not.
  __device__ __forceinline__ Entry entry(bool marked, bool same) const {
    if (marked) return a.same_is_positive ? Entry::left_out : Entry::positive;
    if (!same) return Entry::negative;
    return a.same_is_positive ? Entry::positive : Entry::left_out;
  }
  __device__ __forceinline__ bool summed(Entry e) const {
    return e == Entry::negative || (e == Entry::positive && a.with_positives);
  }
};

// How a block is cut: each thread of a warp has kVectors times 16 bytes of a row, each warp its own columns,
// and goes down the band two rows at a time.
template <class R, int kVectors>
struct Cut {
  static constexpr int kSize = Vec<R>::kSize, kColumns = kVectors * kSize, kStep = 32 * kSize;
  static constexpr int kWarpColumns = kVectors * kStep;
  // of column k of the thread, from its first one
  __device__ __forceinline__ static constexpr int offset(int k) { return k / kSize * kStep + k % kSize; }
  __device__ __forceinline__ static int first() {
    return (static_cast<int>(blockIdx.y) * static_cast<int>(blockDim.x / 32) + threadIdx.x / 32) *
               kWarpColumns +
           threadIdx.x % 32 * kSize;
  }
  // Where `left` columns remain from the thread's first one; what lies beyond is anything.
  __device__ __forceinline__ static void load(const R* p, int left, bool there, R (&v)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kColumns; k += kSize) {
      Vec<R> x{};
      if (there && offset(k) < left) x = load16(p + offset(k));
#pragma unroll
      for (int w = 0; w < kSize; ++w) v[k + w] = x.v[w];
    }
  }
  template <class G>
  __device__ __forceinline__ static void store(G* p, int left, const R (&v)[kColumns]) {
    constexpr int kBytes = kSize * sizeof(G);
#pragma unroll
    for (int k = 0; k < kColumns; k += kSize) {
      if (offset(k) >= left) continue;
      struct alignas(kBytes) {
        G v[kSize];
      } x;
#pragma unroll
      for (int w = 0; w < kSize; ++w) x.v[w] = narrow<G>(v[k + w]);
      using Raw = std::conditional_t<kBytes == 16, uint4, uint2>;
      Raw raw;
      std::memcpy(&raw, &x, kBytes);
      *reinterpret_cast<Raw*>(p + offset(k)) = raw;
    }
  }
};

struct Grid {
  int band, warps;       // of a block: rows and warps
  int64_t bands, spans;  // blocks
};
template <class R, int kVectors>
Grid grid_of(const TileChunk& a, int most_rows) {
  const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  Grid g;
  g.band = a.rows >= 4096 ? most_rows : a.rows >= 1024 ? 16 : 8;
  const int64_t warps = parts(a.cols, Cut<R, kVectors>::kWarpColumns);
  g.warps = static_cast<int>(warps < kWarps ? warps : kWarps);
  g.bands = parts(a.rows, g.band);
  g.spans = parts(warps, g.warps);
  return g;
}
// Of the pass over statistics, and of sigmoid and gradients.
template <class R>
Grid statistics_grid(const TileChunk& a) {
  return a.row_ids ? grid_of<R, 2>(a, kBand) : grid_of<R, 4>(a, kBand);
}
template <class R>
Grid element_grid(const TileChunk& a) {
  return grid_of<R, 2>(a, 32);
}

// A maximum as that to which exponentials are relative: 0 where there is nothing.
template <class R>
__device__ __forceinline__ R base_of(R most) {
  return most == -INFINITY ? R(0) : most;
}

// What a row adds up in one pass.
template <class R>
struct RowSums {
  R first = 0, second = 0;
  __device__ __forceinline__ void merge(const RowSums& o) {
    first += o.first;
    second += o.second;
  }
};
// Two extremes with their places.
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

// part: of each span the rows' maxima, sums of exponentials and sums of positives, of each band the columns'
// maxima and sums.
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
  const bool marked_counts = !a.same_is_positive && a.with_positives;
  FL_SHARED(R, tops, kWarps * kBand);
  FL_SHARED(R, sums, kWarps * kBand);
  FL_SHARED(R, positives, kWarps * kBand);

  R high[kColumns], sum[kColumns];
  int64_t id[kIds ? kColumns : 1];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    high[k] = -INFINITY;
    sum[k] = 0;
    if constexpr (kIds) id[k] = T::offset(k) < left ? a.col_ids[a.col + first + T::offset(k)] : 0;
  }
  for (int r = 0; r < count; r += 2) {
    R v[2][kColumns], most[2], share[2], drawn[2] = {0, 0};
#pragma unroll
    for (int q = 0; q < 2; ++q) T::load(c.row(begin + r + q) + first, left, r + q < count, v[q]);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int last = r + q < count ? left : 0;
      const int mark = r + q < count ? c.mark(begin + r + q) - first : -1;
      const int64_t own = kIds && r + q < count ? a.row_ids[a.row + begin + r + q] : 0;
      most[q] = -INFINITY;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        bool counts = T::offset(k) < last;
        const R x = c.value(v[q][k]);
        if constexpr (kIds) {
          const Entry e = c.entry(T::offset(k) == mark, id[k] == own);
          if (counts && e == Entry::positive) drawn[q] += x;
          counts = counts && c.summed(e);
        } else {
          counts = counts && (T::offset(k) != mark || marked_counts);
        }
        v[q][k] = counts ? x : R(-INFINITY);
        most[q] = max(most[q], v[q][k]);
      }
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
#pragma unroll
      for (int q = 0; q < 2; ++q) most[q] = max(most[q], __shfl_xor_sync(0xffffffffu, most[q], offset));
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const R base = base_of(most[q]);
      share[q] = 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) share[q] += exp(v[q][k] - base);
      share[q] = sum_of_warp(share[q]);
      if constexpr (kIds) drawn[q] = sum_of_warp(drawn[q]);
      if (threadIdx.x % 32 == 0 && r + q < count) {
        tops[warp * kBand + r + q] = most[q];
        sums[warp * kBand + r + q] = share[q];
        if constexpr (kIds) positives[warp * kBand + r + q] = drawn[q];
      }
    }
    if (!a.col_max) continue;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const R top = max(high[k], max(v[0][k], v[1][k])), base = base_of(top);
      sum[k] = sum[k] * exp(high[k] - base) + (exp(v[0][k] - base) + exp(v[1][k] - base));
      high[k] = top;
    }
  }
  __syncthreads();
  const Parts<R> part(a, gridDim.y, gridDim.x);
  const int warps = blockDim.x / 32;
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    const int64_t to = blockIdx.y * a.rows + begin + r;
    R most = -INFINITY, all = 0, drawn = 0;
    for (int w = 0; w < warps; ++w) most = max(most, tops[w * kBand + r]);
    for (int w = 0; w < warps; ++w) {
      all += sums[w * kBand + r] * exp(tops[w * kBand + r] - base_of(most));
      if constexpr (kIds) drawn += positives[w * kBand + r];
    }
    part.row_max[to] = most;
    part.row_sum[to] = all;
    if constexpr (kIds) part.row_positive[to] = drawn;
  }
  if (!a.col_max) return;
#pragma unroll
  for (int k = 0; k < kColumns; ++k)
    if (T::offset(k) < left) {
      const int64_t to = blockIdx.x * a.cols + first + T::offset(k);
      part.col_max[to] = high[k];
      part.col_sum[to] = sum[k];
    }
}

// 32 rows, or columns, a block; eight threads for the parts of each. Rows come first.
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
  const bool add_positives = is_row && a.positive && a.row_ids && a.same_is_positive;
  FL_SHARED(R, tops, kMergeThreads);
  FL_SHARED(R, sums, kMergeThreads);
  FL_SHARED(R, positives, kMergeThreads);
  R most = -INFINITY, sum = 0, drawn = 0;
  if (k < count) {
#pragma unroll 4
    for (int64_t p = group; p < parts; p += kGroups) most = max(most, max_of[p * count + k]);
#pragma unroll 4
    for (int64_t p = group; p < parts; p += kGroups)
      sum += sum_of[p * count + k] * exp(max_of[p * count + k] - base_of(most));
    if (add_positives)
      for (int64_t p = group; p < parts; p += kGroups) drawn += part.row_positive[p * count + k];
  }
  tops[threadIdx.x] = most;
  sums[threadIdx.x] = sum;
  positives[threadIdx.x] = drawn;
  __syncthreads();
  if (group || k >= count) return;
  void* const top_to = is_row ? a.row_max : a.col_max;
  void* const sum_to = is_row ? a.row_log_sum : a.col_log_sum;
  const int64_t to = (is_row ? a.row : a.col) + k;
  const bool begun = is_row ? a.col > 0 : a.row > 0;
  const bool last = is_row ? a.col + a.cols == a.n : a.row + a.rows == a.m;
  const R former = begun && top_to ? c.at(top_to, to) : R(-INFINITY);
  most = former;
  for (int g = 0; g < kGroups; ++g) most = max(most, tops[g * 32 + lane]);
  sum = begun && top_to ? c.at(sum_to, to) * exp(former - base_of(most)) : R(0);
  for (int g = 0; g < kGroups; ++g) sum += sums[g * 32 + lane] * exp(tops[g * 32 + lane] - base_of(most));
  if (top_to) {
    c.at(top_to, to) = last ? base_of(most) : most;
    c.at(sum_to, to) = last ? log(sum) : sum;
  }
  if (!is_row || !a.positive) return;
  drawn = begun ? c.at(a.positive, to) : R(0);
  if (add_positives) {
    for (int g = 0; g < kGroups; ++g) drawn += positives[g * 32 + lane];
  } else if (!a.same_is_positive) {
    const int mark = c.mark(k);
    if (mark >= 0) drawn += c.value(c.row(k)[mark]);
  }
  c.at(a.positive, to) = drawn;
}

template <class R>
__global__ void __launch_bounds__(kRowThreads, 8) pairs_kernel(TileChunk a) {
  const Chunk<R> c(a);
  const int64_t r = blockIdx.x, i = a.row + r;
  const R m = c.at(a.row_max, i), log_sum = c.at(a.row_log_sum, i);
  const int mark = c.mark(r);
  const int64_t own = a.row_ids ? a.row_ids[i] : 0;
  RowSums<R> sums;
  for (int j = threadIdx.x; j < a.cols; j += kRowThreads) {
    if (c.entry(j == mark, a.row_ids && a.col_ids[a.col + j] == own) != Entry::positive) continue;
    R slope;
    sums.first += softplus((m - c.value(c.row(r)[j])) + log_sum, slope);
    sums.second += slope;
  }
  sums = joined(sums);
  if (threadIdx.x) return;
  c.at(a.positive, i) = (a.col ? c.at(a.positive, i) : R(0)) + sums.first;
  c.at(a.row_grad, i) = (a.col ? c.at(a.row_grad, i) : R(0)) + sums.second;
}

// Of each row the sum over the warps that have it, at `place` of the parts of this span.
template <class R>
__device__ __forceinline__ void leave_sums(const TileChunk& a, int64_t begin, int count, int place,
                                           const R (&of_warp)[kWarps * kBand]) {
  R* const part = static_cast<R*>(a.part) + (int64_t{place} * gridDim.y + blockIdx.y) * a.rows + begin;
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    R sum = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) sum += of_warp[w * kBand + r];
    part[r] = sum;
  }
}

// part: of each span the rows' sums of losses, then those of slopes, then dots
template <class R, class G, bool kIds>
__global__ void __launch_bounds__(kWarps * 32) sigmoid_kernel(TileChunk a, int band) {
  using T = Cut<R, 2>;
  constexpr int kColumns = T::kColumns;
  const Chunk<R> c(a);
  const int first = T::first(), left = static_cast<int>(a.cols) - first, warp = threadIdx.x / 32;
  const int64_t begin = int64_t{blockIdx.x} * band;
  const int count = a.rows - begin < band ? static_cast<int>(a.rows - begin) : band;
  FL_SHARED(R, losses, kWarps * kBand);
  FL_SHARED(R, slopes, kWarps * kBand);
  FL_SHARED(R, dots, kWarps * kBand);
  int64_t id[kIds ? kColumns : 1];
  if constexpr (kIds) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k)
      id[k] = T::offset(k) < left ? a.col_ids[a.col + first + T::offset(k)] : 0;
  }
  for (int r = 0; r < count; r += 2) {
    R v[2][kColumns], loss[2] = {0, 0}, steep[2] = {0, 0}, dot[2] = {0, 0};
#pragma unroll
    for (int q = 0; q < 2; ++q) T::load(c.row(begin + r + q) + first, left, r + q < count, v[q]);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const bool there = r + q < count;
      const int64_t i = a.row + begin + r + q;
      const int mark = there ? c.mark(begin + r + q) - first : -1;
      const int64_t own = kIds && there ? a.row_ids[i] : 0;
      const R up = there && a.row_grad ? c.at(a.row_grad, i) : R(0);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const Entry e = c.entry(T::offset(k) == mark, kIds && id[kIds ? k : 0] == own);
        const R x = c.value(v[q][k]), sign = e == Entry::positive ? R(-1) : R(1);
        R slope = 0;
        if (e != Entry::left_out && T::offset(k) < left) {
          loss[q] += softplus(sign * x, slope);
          slope *= sign;
          steep[q] += slope;
        }
        slope *= up;
        if (T::offset(k) < left) dot[q] += slope * v[q][k];
        v[q][k] = slope;
      }
      if (there && a.row_grad)
        T::store(static_cast<G*>(a.g) + (begin + r + q) * a.g_pitch + first, left, v[q]);
      loss[q] = sum_of_warp(loss[q]);
      steep[q] = sum_of_warp(steep[q]);
      if (a.dots) dot[q] = sum_of_warp(dot[q]);
      if (threadIdx.x % 32 == 0 && there) {
        losses[warp * kBand + r + q] = loss[q];
        slopes[warp * kBand + r + q] = steep[q];
        dots[warp * kBand + r + q] = dot[q];
      }
    }
  }
  __syncthreads();
  leave_sums(a, begin, count, 0, losses);
  leave_sums(a, begin, count, 1, slopes);
  if (a.dots) leave_sums(a, begin, count, 2, dots);
}

// to[r] becomes or grows by the sum over spans of what lies at `place` of part.
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
    add_up(a.positive, 0);
    add_up(a.row_log_sum, 1);
  }
  add_up(a.dots, sigmoid ? 2 : 0);
}

// Blocks are of whole rows here.
template <class R>
__global__ void __launch_bounds__(kRowThreads, 8) hardest_kernel(TileChunk a) {
  const Chunk<R> c(a);
  const int64_t r = blockIdx.x, i = a.row + r;
  const int mark = c.mark(r);
  const int64_t own = a.row_ids ? a.row_ids[i] : 0;
  Extremes<R> x;
  for (int j = threadIdx.x; j < a.cols; j += kRowThreads) {
    const Entry e = c.entry(j == mark, a.row_ids && a.col_ids[j] == own);
    const R key = c.value(c.row(r)[j]) + c.at(a.col_max, j);
    if (e == Entry::positive) x.take_positive(key, j);
    if (e == Entry::negative) x.take_negative(key, j);
  }
  x = joined(x);
  if (threadIdx.x) return;
  a.hardest[i] = x.positive;
  a.hardest[a.m + i] = x.negative;
}

// softmax_share, for a gradient that is rounded to G: a half type does not see an exponential's last digits.
template <class G, class R>
__device__ __forceinline__ R share(R s, R m, R log_sum) {
  if constexpr (std::is_same_v<G, R>) return softmax_share(s, m, log_sum);
  return log_sum == R(-INFINITY) ? R(0) : exp((s - m) - log_sum);
}

// softmax_gradient and pairs_gradient
template <class R, class G, bool kIds>
__global__ void __launch_bounds__(kWarps * 32) gradient_kernel(TileChunk a, int band) {
  using T = Cut<R, 2>;
  constexpr int kColumns = T::kColumns;
  const Chunk<R> c(a);
  const int first = T::first(), left = static_cast<int>(a.cols) - first;
  const int64_t begin = int64_t{blockIdx.x} * band;
  const int count = a.rows - begin < band ? static_cast<int>(a.rows - begin) : band;
  FL_SHARED(R, row_max, kBand);
  FL_SHARED(R, row_log_sum, kBand);
  FL_SHARED(R, row_grad, kBand);
  FL_SHARED(R, row_positive, kBand);
  FL_SHARED(R, dots, kWarps * kBand);
  FL_SHARED(int, marks, kBand);
  FL_SHARED(int64_t, row_id, kBand);
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    const int64_t i = a.row + begin + r;
    row_max[r] = a.row_max ? c.at(a.row_max, i) : R(0);
    // -inf: no share of anything
    row_log_sum[r] = a.row_log_sum ? c.at(a.row_log_sum, i) : R(-INFINITY);
    row_grad[r] = a.row_grad ? c.at(a.row_grad, i) : R(0);
    row_positive[r] = a.positive_grad ? c.at(a.positive_grad, i) : R(0);
    marks[r] = c.mark(begin + r);
    row_id[r] = kIds ? a.row_ids[i] : 0;
  }
  R col_max[kColumns], col_log_sum[kColumns], col_grad[kColumns];
  int64_t id[kIds ? kColumns : 1];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const bool there = T::offset(k) < left;
    const int64_t j = a.col + first + T::offset(k);
    if constexpr (kIds) id[k] = there ? a.col_ids[j] : 0;
    const bool columns = there && a.col_grad;
    col_max[k] = columns ? c.at(a.col_max, j) : R(0);
    col_log_sum[k] = columns ? c.at(a.col_log_sum, j) : R(-INFINITY);
    col_grad[k] = columns ? c.at(a.col_grad, j) : R(0);
  }
  __syncthreads();
  const auto drawn = [&](R v, R up, R top, R log_sum) {
    R slope = -1;
    if (a.pass == TilePass::pairs_gradient) softplus((top - v) + log_sum, slope);
    return up * slope;
  };
  for (int r = 0; r < count; r += 2) {
    R v[2][kColumns];
#pragma unroll
    for (int q = 0; q < 2; ++q) T::load(c.row(begin + r + q) + first, left, r + q < count, v[q]);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int at = r + q;
      if (at >= count) continue;
      const int mark = marks[at] - first;
      const int64_t own = row_id[at];
      const R top = row_max[at], log_sum = row_log_sum[at], up = row_grad[at];
      // First as if every entry was summed, and without a branch: the exponentials of several entries are
      // under way at a time. Then what counts as something else, of which without ids a row has one at most.
      R g[kColumns];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const R x = c.value(v[q][k]);
        g[k] = up * share<G>(x, top, log_sum) + col_grad[k] * share<G>(x, col_max[k], col_log_sum[k]);
      }
      if (kIds || static_cast<unsigned>(mark) <= static_cast<unsigned>(T::offset(kColumns - 1))) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const bool marked = T::offset(k) == mark, same = kIds && id[kIds ? k : 0] == own;
          if (!marked && !same) continue;
          const Entry e = c.entry(marked, same);
          if (!c.summed(e)) g[k] = 0;
          if (e != Entry::positive || !a.positive_grad) continue;
          const R x = c.value(v[q][k]);
          g[k] -= drawn(x, row_positive[at], top, log_sum);
          const int64_t j = a.col + first + T::offset(k);
          if (a.col_positive_grad && T::offset(k) < left)
            g[k] -= drawn(x, c.at(a.col_positive_grad, j), c.at(a.col_max, j), c.at(a.col_log_sum, j));
        }
      }
      R dot = 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (T::offset(k) < left) dot += g[k] * v[q][k];
        v[q][k] = g[k];
      }
      T::store(static_cast<G*>(a.g) + (begin + at) * a.g_pitch + first, left, v[q]);
      if (!a.dots) continue;
      dot = sum_of_warp(dot);
      if (threadIdx.x % 32 == 0) dots[threadIdx.x / 32 * kBand + at] = dot;
    }
  }
  if (!a.dots) return;
  __syncthreads();
  leave_sums(a, begin, count, 0, dots);
}

// The kernel of this name for ids or none, on the grid.
#define FASTLOSS_BY_IDS(kernel, grid, ...)                            \
  (a.row_ids ? start_cut<&kernel<__VA_ARGS__, true>>(a, grid, stream) \
             : start_cut<&kernel<__VA_ARGS__, false>>(a, grid, stream))

template <auto kKernel>
void start_cut(const TileChunk& a, const Grid& g, cudaStream_t stream) {
  (void)Registered<kKernel>::done;
  launch(kKernel, dim3(static_cast<unsigned>(g.bands), static_cast<unsigned>(g.spans)),
         dim3(static_cast<unsigned>(g.warps * 32)), 0, stream, a, g.band);
}

template <class R, class G>
void run_gradient(const TileChunk& a, cudaStream_t stream) {
  const Grid g = element_grid<R>(a);
  if (a.pass == TilePass::sigmoid)
    FASTLOSS_BY_IDS(sigmoid_kernel, g, R, G);
  else
    FASTLOSS_BY_IDS(gradient_kernel, g, R, G);
}

template <class R>
void run(const TileChunk& a, cudaStream_t stream) {
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  switch (a.pass) {
    case TilePass::statistics: {
      const Grid g = statistics_grid<R>(a);
      FASTLOSS_BY_IDS(statistics_kernel, g, R);
      return start<&merge_kernel<R>>(blocks(a.rows, 32) + (a.col_max ? blocks(a.cols, 32) : 0), kMergeThreads,
                                     0, stream, a, g.spans, g.bands);
    }
    case TilePass::pairs:
      return start<&pairs_kernel<R>>(a.rows, kRowThreads, 0, stream, a);
    case TilePass::hardest:
      return start<&hardest_kernel<R>>(a.rows, kRowThreads, 0, stream, a);
    case TilePass::sigmoid:
    case TilePass::softmax_gradient:
    case TilePass::pairs_gradient:
      if constexpr (std::is_same_v<R, double>)
        run_gradient<double, double>(a, stream);
      else if (a.g_type == DType::bf16)
        run_gradient<float, __nv_bfloat16>(a, stream);
      else if (a.g_type == DType::f16)
        run_gradient<float, __half>(a, stream);
      else
        run_gradient<float, float>(a, stream);
      if (a.pass == TilePass::sigmoid || a.dots)
        start<&spans_kernel<R>>(blocks(a.rows, kRowThreads), kRowThreads, 0, stream, a,
                                element_grid<R>(a).spans, a.pass == TilePass::sigmoid);
      return;
  }
}

template <class R>
int64_t partials(const TileChunk& a) {
  if (a.pass == TilePass::sigmoid) return 3 * element_grid<R>(a).spans * a.rows;
  if (a.pass != TilePass::statistics) return a.dots ? element_grid<R>(a).spans * a.rows : 0;
  const Grid g = statistics_grid<R>(a);
  return 3 * g.spans * a.rows + (a.col_max ? 2 * g.bands * a.cols : 0);
}

}  // namespace

int64_t tile_partials(const TileChunk& a) { return a.wide ? partials<double>(a) : partials<float>(a); }

void tile_chunk(const TileChunk& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  a.wide ? run<double>(a, s) : run<float>(a, s);
}

}  // namespace fastloss::cuda
