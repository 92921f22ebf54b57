// A row of any length, of which what does not stay on the chip is swept over in memory: 16 bytes a thread
// at a time, several of them on their way together.
#pragma once
#include "row_held.cuh"

namespace fastloss::cuda {

template <class Loss, class T, int kTeam, bool kBackward>
struct SweptRow : HeldRow<Loss, T, kTeam, kBackward> {
  using Base = HeldRow<Loss, T, kTeam, kBackward>;
  using Base::a, Base::x, Base::t, Base::lane, Base::slots, Base::unit;
  using Base::N, Base::kInFlight, Base::kHold, Base::kStay, Base::u_of, Base::add_one, Base::add_vector;
  using Base::sweep_kept, Base::write_kept, Base::grad, Base::grads, Base::put, Base::write;
  using typename Base::R, typename Base::Slope, typename Base::Kept, typename Base::Held;

  // Whether the row starts on 16 bytes is asked once, not at every load: between such branches no second load
  // would be on its way.
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
    const int64_t last = kAligned ? body : a.n - N;  // a shifted load looks one vector ahead
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
  // The classes in [begin, end) by one thread, in parts of parts: in one go all rounding errors would add up.
  // Relative to the maximum of `known` or more.
  template <int kPart>
  __device__ __forceinline__ Online<Loss, R> sweep_parts(const Online<Loss, R>& known, int64_t begin,
                                                         int64_t end) const {
    Online<Loss, R> o;
    o.m = known.m;
    if constexpr (kPart == 1) {
#pragma unroll 1
      for (int64_t j = begin; j < end; ++j) add_one(o, j, x[j * a.x_layout.class_stride]);
    } else {
#pragma unroll 1
      for (; begin < end; begin += kPart) {
        const auto part = sweep_parts<kPart / 32>(o, begin, begin + kPart < end ? begin + kPart : end);
        o.follow(part.m, unit);
        o.take(part);
      }
    }
    return o;
  }
  __device__ __forceinline__ Online<Loss, R> sweep(Kept& kept) const {
    Online<Loss, R> o;
    const int64_t n = a.n;
    if constexpr (kTeam == 1) return sweep_parts<1024>(o, 0, n);  // others are given rows without gaps
    // by index, not by address: which thread adds what must not depend on where the row lies
    const int64_t body = n / N * N;
    if (kStay && slots) {  // beside what is kept there is room for fewer on their way
      sweep_vectors<true, 2>(o, sweep_kept(o, kept, body), body);
    } else if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      sweep_vectors<true, kStay ? 2 : kInFlight>(o, 0, body);
    } else {
      sweep_vectors<false, kStay || kHold ? 2 : kInFlight>(o, 0, body);
    }
#pragma unroll 1
    for (int64_t j = body + lane; j < n; j += kTeam) add_one(o, j, x[j]);
    return o;
  }
  // Where the target wins by some 60 nats the others' exponentials begin to pass below 2^-126, where they are
  // flushed: their sum once more, relative to a maximum that much lower. Such rows are few.
  __device__ __forceinline__ void add_small(Online<Loss, R>& o) const {
    if constexpr (sizeof(R) == 4 && !Loss::kPlanes) {
      if (!(o.s < R(1.2e-30) * R(a.n)) || !(o.m > -INFINITY)) return;
      constexpr R kLower = 64;
      Online<Loss, R> again;
      again.m = o.m;
      for (int64_t j = lane; j < a.n; j += kTeam)
        if (j != t) again.s += exp(unit.distance(u_of(widen(x[j * a.x_layout.class_stride])) - o.m) + kLower);
      if constexpr (kTeam > 32) __syncthreads();  // all have read what the sums were shared through
      o.s = team_sum<kTeam>(again).s * R(1.603810890548638e-28);  // e^-64
    }
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
    const int64_t n = a.n, from = a.x_layout.class_stride, to = a.dx_layout.class_stride;
    if (kTeam == 1 || from != 1 || to != 1) {
      for (int64_t j = lane; j < n; j += kTeam) dx[j * to] = grad(s, j, x[j * from]);
      return;
    }
    const int64_t head = elements_to_boundary(dx, n), body = head + (n - head) / N * N;
    for (int64_t j = lane; j < head; j += kTeam) dx[j] = grad(s, j, x[j]);
    if (kStay && slots) {
      write_vectors<true>(s, dx, write_kept(s, dx, kept, body), body);
    } else if (head == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      write_vectors<true>(s, dx, head, body);
    } else {
      write_vectors<false>(s, dx, head, body);
    }
    for (int64_t j = body + lane; j < n; j += kTeam) dx[j] = grad(s, j, x[j]);
  }
  __device__ __forceinline__ void write_row(const Slope& s, T* dx, Held& held, bool whole,
                                            const Kept& kept) const {
    // In place the target's logit, which all have read, is overwritten by one: shuffles order no memory. A
    // block has had a barrier since.
    if constexpr (kTeam > 1 && kTeam <= 32) __syncwarp(team_mask<kTeam>());
    if constexpr (kHold > 0)
      if (whole) return write(s, dx, held);
    write(s, dx, kept);
  }
};

}  // namespace fastloss::cuda
