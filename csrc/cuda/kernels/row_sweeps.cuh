// A row of any length: the part that does not stay on the chip is read from memory, 16 bytes for each thread
// at a time, with several loads in flight.
#pragma once
#include "row_held.cuh"

namespace fastloss::cuda {

template <class Loss, class T, int kTeam, bool kBackward, bool kCluster>
struct SweptRow : HeldRow<Loss, T, kTeam, kBackward, kCluster> {
  using Base = HeldRow<Loss, T, kTeam, kBackward, kCluster>;
  using Base::a, Base::x, Base::t, Base::lane, Base::slots, Base::unit, Base::classes;
  using Base::add, Base::column, Base::in_tile, Base::stays, Base::x_stride, Base::dx_stride,
      Base::sweep_kept, Base::write_kept, Base::grad, Base::grads, Base::put, Base::write, Base::write_target;
  using Base::N, Base::kInFlight, Base::kHold, Base::kStay, Base::kParts, Base::u_of, Base::add_one,
      Base::add_vector;
  using typename Base::R, typename Base::Slope, typename Base::Kept, typename Base::Held;

  // kAligned: the row starts on 16 bytes. A branch at every load would keep the next load from being issued.
  template <bool kAligned, int kFlight = kInFlight>
  __device__ __forceinline__ void sweep_vectors(Online<Loss, R>& o, int64_t begin, int64_t body) const {
    constexpr int64_t kStep = int64_t{kTeam} * N;
    const T* end = x + a.n;
    const unsigned off = kAligned ? 0 : static_cast<unsigned>(reinterpret_cast<uintptr_t>(x) % 16);
    int64_t j = begin + int64_t{lane} * N;
    if (!kAligned && j < body) {
      add_vector(o, j, load16_any(x + j, x, end));
      j += kStep;
    }
    // a shifted load also reads the next vector
    const int64_t last = kAligned || (kParts && body < a.n - N) ? body : a.n - N;
#pragma unroll 1
    for (; j + (kFlight - 1) * kStep + N <= last; j += kFlight * kStep) {
      Vec<T> v[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u)
        v[u] = kAligned ? load16(x + j + u * kStep) : load16_shifted(x + j + u * kStep, off);
#pragma unroll
      for (int u = 0; u < kFlight; ++u) add_vector(o, j + u * kStep, v[u]);
    }
#pragma unroll 1
    for (; j < body; j += kStep) add_vector(o, j, kAligned ? load16(x + j) : load16_any(x + j, x, end));
  }
  // Sums the classes in [begin, end) by one thread, recursively in parts, so that rounding errors stay
  // small. The maximum starts at that of `known`.
  template <int kPart, class Row>
  __device__ __forceinline__ Online<Loss, R> sweep_parts(const Row& row, const Online<Loss, R>& known,
                                                         int64_t begin, int64_t end) const {
    Online<Loss, R> o;
    o.m = known.m;
    if constexpr (kPart == 1) {
      int64_t j = begin;
#pragma unroll 1
      for (; j + kInFlight <= end; j += kInFlight) {
        R u[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) u[k] = widen(row[j + k]);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) u[k] = u_of(u[k]);
        add(o, j, u);
      }
#pragma unroll 1
      for (; j < end; ++j) add_one(o, j, row[j]);
    } else {
#pragma unroll 1
      for (; begin < end; begin += kPart) {
        const auto part = sweep_parts<kPart / 32>(row, o, begin, begin + kPart < end ? begin + kPart : end);
        o.follow(part.m, unit);
        o.take(part);
      }
    }
    return o;
  }
  // The sums of the classes from begin to end: the row, or one of its parts.
  __device__ __forceinline__ Online<Loss, R> sweep(Kept& kept, int64_t begin, int64_t end) const {
    Online<Loss, R> o;
    if constexpr (kTeam == 1) {  // larger teams have contiguous rows
      if (in_tile())
        return end <= 32 ? sweep_parts<1>(column(), o, 0, end) : sweep_parts<32>(column(), o, 0, end);
      return sweep_parts<1024>(typename Base::template Strided<const T>{x, x_stride()}, o, begin, end);
    }
    // by index, not by address: the order of sums must not depend on alignment
    const int64_t body = end / N * N;
    if (stays() && (kCluster || begin == 0)) {  // registers hold kept vectors: fewer loads in flight
      sweep_vectors<true, 2>(o, sweep_kept(o, kept, body), body);
    } else if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      sweep_vectors<true, kStay ? 2 : kInFlight>(o, begin, body);
    } else {
      sweep_vectors<false, kStay || kHold ? 2 : kInFlight>(o, begin, body);
    }
#pragma unroll 1
    for (int64_t j = body + lane; j < end; j += kTeam) add_one(o, j, x[j]);
    return o;
  }
  // If the target's logit is some 60 above the others, their exponentials fall below 2^-126 and are flushed
  // to 0: sums them again relative to a base lower by 64. Such rows are rare. `before`: classes of the row
  // before x. Says whether it read the row.
  __device__ __forceinline__ bool add_small(Online<Loss, R>& o, int64_t before) const {
    if constexpr (sizeof(R) == 4 && !Loss::kOutputs) {
      if (!(o.s < R(1.2e-30) * R(a.n)) || !(o.m > -INFINITY)) return false;
      constexpr R kLower = 64;
      Online<Loss, R> again;
      again.m = o.m;
      const T* const row = x - before;
      for (int64_t j = lane; j < a.n; j += kTeam)
        if (j != t + before) again.s += exp(unit.distance(u_of(widen(row[j * x_stride()])) - o.m) + kLower);
      if constexpr (kTeam > 32) __syncthreads();  // hazard: the shared memory of the first team_sum is reused
      o.s = team_sum<kTeam>(again).s * R(1.603810890548638e-28);  // e^-64
      return true;
    }
    return false;
  }

  // Gradients of a row of one thread.
  template <class From, class To>
  __device__ __forceinline__ void write_each(const Slope& s, const From& from, const To& to) const {
#pragma unroll 4
    for (int64_t j = 0; j < a.n; ++j) to[j] = grad(s, j, from[j]);
    write_target(s, to, a.n, a.n);
  }
  template <bool kAligned>
  __device__ __forceinline__ void write_vectors(const Slope& s, T* dx, int64_t begin, int64_t body) const {
    constexpr int64_t kStep = int64_t{kTeam} * N;
    int64_t j = begin + int64_t{lane} * N;
    if constexpr (kAligned) {
      for (; j + (kInFlight - 1) * kStep < body; j += kInFlight * kStep) {
        Vec<T> v[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) v[u] = load16(x + j + u * kStep);
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) put(dx + j + u * kStep, grads(s, j + u * kStep, v[u]));
      }
    }
    for (; j < body; j += kStep)
      put(dx + j, grads(s, j, kAligned ? load16(x + j) : load16_any(x + j, x, x + a.n)));
  }
  __device__ __forceinline__ void write(const Slope& s, T* dx, const Kept& kept) const {
    using Strided = typename Base::template Strided<T>;
    const int64_t n = classes(), from = x_stride(), to = dx_stride();
    if constexpr (kTeam == 1) {
      if (in_tile()) return write_each(s, column(), column());
      return write_each(s, typename Base::template Strided<const T>{x, from}, Strided{dx, to});
    }
    if (!kCluster && (from != 1 || to != 1)) {
      for (int64_t j = lane; j < n; j += kTeam) dx[j * to] = grad(s, j, x[j * from]);
      return write_target(s, Strided{dx, to}, n, n);
    }
    const int64_t head = kCluster ? 0 : elements_to_boundary(dx, n), body = head + (n - head) / N * N;
    for (int64_t j = lane; j < head; j += kTeam) dx[j] = grad(s, j, x[j]);
    if (stays()) {
      write_vectors<true>(s, dx, write_kept(s, dx, kept, body), body);
    } else if (head == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      write_vectors<true>(s, dx, head, body);
    } else {
      write_vectors<false>(s, dx, head, body);
    }
    for (int64_t j = body + lane; j < n; j += kTeam) dx[j] = grad(s, j, x[j]);
    write_target(s, dx, head, body);
  }
  __device__ __forceinline__ void write_row(const Slope& s, T* dx, Held& held, bool whole,
                                            const Kept& kept) const {
    // Hazard in place: all lanes have read the target's logit, which one of them overwrites, and shuffles do
    // not order memory. A block has had a barrier since.
    if constexpr (kTeam > 1 && kTeam <= 32) __syncwarp(team_mask<kTeam>());
    if constexpr (kHold > 0)
      if (whole) return write(s, dx, held);
    write(s, dx, kept);
  }
};

}  // namespace fastloss::cuda
