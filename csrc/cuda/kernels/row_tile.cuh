// Rows whose classes are strided, as in [N, C, H, W]: one thread each, where neighbouring threads have
// rows that are neighbours in memory. If the rows are short, a block copies a tile of them to shared
// memory, 16 bytes (several rows of one class) at a time; the gradient overwrites the tile, and goes from
// there to device memory.
#pragma once
#include "row_reader.cuh"

namespace fastloss::cuda {

// The largest tile of kThreads rows, for 4 blocks on a multiprocessor.
constexpr int64_t kTileBytes = 48 << 10;

// Whether 16 bytes of a class are neighbouring rows, throughout.
template <class T>
bool rows_on_vectors(const void* start, const RowLayout& l, int64_t rows) {
  constexpr int64_t N = Vec<T>::kSize;
  const bool neighbours = l.inner == 1 ? l.outer_stride == 1 && rows % N == 0
                                       : l.inner_stride == 1 && l.inner % N == 0 && l.outer_stride % N == 0;
  return neighbours && reinterpret_cast<uintptr_t>(start) % 16 == 0 && l.class_stride % N == 0;
}
// The vectors of a tile; 0: the rows are read where they lie.
template <class T>
int64_t vectors_of_tile(const RowArgs& a) {
  const int64_t vectors = a.n * (kThreads / Vec<T>::kSize);
  const bool fits = vectors <= kTileBytes / 16 && rows_on_vectors<T>(a.x, a.x_layout, a.rows) &&
                    (!a.dx || rows_on_vectors<T>(a.dx, a.dx_layout, a.rows));
  return fits ? vectors : 0;
}

// Calls move(vector of the tile, its offset in a tensor of this layout) for this thread's vectors;
// `first` is the tile's first row. In the tile each class is kThreads rows long.
template <class T, class Move>
__device__ __forceinline__ void each_of_tile(Vec<T>* tile, const RowArgs& a, const RowLayout& l,
                                             int64_t first, Move move) {
  constexpr int N = Vec<T>::kSize, kAcross = kThreads / N;
  const int column = threadIdx.x % kAcross;
  const int64_t r = first + column * N;
  if (r >= a.rows) return;  // rows come in whole vectors
  const int64_t start = l.start(r);
#pragma unroll 1
  for (int64_t j = threadIdx.x / kAcross; j < a.n; j += N)
    move(tile + j * kAcross + column, start + j * l.class_stride);
}
// For whole blocks. The tile of logits is visible to all threads afterwards.
template <class T>
__device__ __forceinline__ void load_tile(Vec<T>* tile, const RowArgs& a, int64_t first) {
  const T* const all = static_cast<const T*>(a.x);
  each_of_tile(tile, a, a.x_layout, first,
               [&](Vec<T>* to, int64_t at) { __pipeline_memcpy_async(to, all + at, 16); });
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}
// For whole blocks, after every thread has written its row's gradient.
template <class T>
__device__ __forceinline__ void store_tile(Vec<T>* tile, const RowArgs& a, int64_t first) {
  __syncthreads();
  each_of_tile(tile, a, a.dx_layout, first,
               [&](const Vec<T>* from, int64_t at) { store16(static_cast<T*>(a.dx) + at, *from); });
}

}  // namespace fastloss::cuda
