// A block of a matrix of similarities, and how it is cut: bands of rows by spans of columns.
#pragma once
#include "../../drivers/similarity.h"
#include "../../losses/similarity.h"
#include "../reduce.cuh"

namespace fastloss::cuda::similarity {

constexpr int kWarps = 8, kBand = 64;  // of a thread block, at most: warps next to each other, rows

// A sum that is not contracted to an FMA, like `product`: so all passes see the same similarity.
__device__ __forceinline__ float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double rounded_sum(double a, double b) { return __dadd_rn(a, b); }

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
  // Row r of the block.
  __device__ __forceinline__ const R* row(int64_t r) const {
    return static_cast<const R*>(a.s) + r * a.s_pitch;
  }
  __device__ __forceinline__ R value(R s) const { return rounded_sum(product(s, scale), bias); }
  // The target column of row r relative to the block, or -1 if it is in another block.
  __device__ __forceinline__ int target_col(int64_t r) const {
    if (!a.target_col) return -1;
    const int64_t j = a.target_col[a.row + r] - a.col;
    return j >= 0 && j < a.cols ? static_cast<int>(j) : -1;
  }
  // What an entry counts as, see EntryRule.
  __device__ __forceinline__ Entry entry(bool is_target, bool equal) const {
    return rule()(is_target, equal);
  }
  __device__ __forceinline__ bool summed(Entry e) const { return rule().summed(e); }
  __device__ __forceinline__ EntryRule rule() const {
    return {a.labels_are_positives, a.positives_in_denominator};
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
  // `left`: columns from the thread's first one to the end of the row. Values beyond are unspecified.
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
Grid grid_of(const TileChunk& a, int max_rows) {
  const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  Grid g;
  g.band = a.rows >= 4096 ? max_rows : a.rows >= 1024 ? 16 : 8;
  const int64_t warps = parts(a.cols, Cut<R, kVectors>::kWarpColumns);
  g.warps = static_cast<int>(warps < kWarps ? warps : kWarps);
  g.bands = parts(a.rows, g.band);
  g.spans = parts(warps, g.warps);
  return g;
}
// The grids of the pass `statistics`, and of sigmoid and the gradients.
template <class R>
Grid statistics_grid(const TileChunk& a) {
  return a.row_ids ? grid_of<R, 2>(a, kBand) : grid_of<R, 4>(a, kBand);
}
template <class R>
Grid element_grid(const TileChunk& a) {
  return grid_of<R, 2>(a, 32);
}

// Adds each row's sums over the warps, and stores them as partial sum number `place` of this span.
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

}  // namespace fastloss::cuda::similarity
