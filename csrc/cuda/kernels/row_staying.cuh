// A long row, or a cluster's part of one, that a persistent block keeps on the chip as far as it fits: the
// first vectors in shared memory, some more in registers. While its gradient is written, asynchronous copies
// fill each slot of shared memory with the next row. A single block that takes a row in parts keeps of the
// first part alone.
#pragma once
#include "row_reader.cuh"

namespace fastloss::cuda {

template <class Loss, class T, int kTeam, bool kBackward, bool kCluster>
struct StayingRow : RowReader<Loss, T, kTeam, kBackward, kCluster> {
  using Base = RowReader<Loss, T, kTeam, kBackward, kCluster>;
  using Base::a, Base::x, Base::lane, Base::cache, Base::slots, Base::more, Base::next;
  using Base::N, Base::kKeep, Base::add_vector, Base::grads, Base::put;
  using typename Base::R, typename Base::Slope;

  // This thread's vectors in registers; they follow those in shared memory.
  struct Kept {
    Vec<T> v[kKeep > 0 ? kKeep : 1];
  };
  __device__ __forceinline__ int64_t kept_at(int u) const { return (slots + lane + int64_t{u} * kTeam) * N; }
  // Starts the copy of the next row's vector into this slot, whose vector is not needed any more.
  __device__ __forceinline__ void refill(int slot) const {
    if (more) __pipeline_memcpy_async(cache + slot, x + next + int64_t{slot} * N, 16);
  }
  __device__ __forceinline__ void refill_all() const {
    __pipeline_wait_prior(0);  // hazard: two copies into one slot are unordered
    for (int slot = lane; slot < slots; slot += kTeam) refill(slot);
    __pipeline_commit();
  }
  // Adds the vectors on the chip: shared memory, then registers. Returns the first class after them.
  __device__ __forceinline__ int64_t sweep_kept(Online<Loss, R>& o, Kept& kept, int64_t body) const {
#pragma unroll
    for (int u = 0; u < kKeep; ++u)
      if (kept_at(u) < body) kept.v[u] = load16(x + kept_at(u));
    __pipeline_wait_prior(0);
    for (int slot = lane; slot < slots; slot += kTeam) {
      add_vector(o, int64_t{slot} * N, cache[slot]);
      if (!a.dx) refill(slot);
    }
    if (!a.dx) __pipeline_commit();
#pragma unroll
    for (int u = 0; u < kKeep; ++u)
      if (kept_at(u) < body) add_vector(o, kept_at(u), kept.v[u]);
    return int64_t{slots + kKeep * kTeam} * N;
  }
  // Writes the gradients of the vectors on the chip and starts the copies of the next row. Returns the first
  // class after them.
  __device__ __forceinline__ int64_t write_kept(const Slope& s, T* dx, const Kept& kept, int64_t body) const {
    for (int slot = lane; slot < slots; slot += kTeam) {
      put(dx + int64_t{slot} * N, grads(s, int64_t{slot} * N, cache[slot]));
      refill(slot);
    }
    __pipeline_commit();
#pragma unroll
    for (int u = 0; u < kKeep; ++u)
      if (kept_at(u) < body) put(dx + kept_at(u), grads(s, kept_at(u), kept.v[u]));
    return int64_t{slots + kKeep * kTeam} * N;
  }
};

}  // namespace fastloss::cuda
