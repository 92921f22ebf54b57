// A short row that a team holds in its registers: read once; sums and gradient are computed from there.
#pragma once
#include "row_staying.cuh"

namespace fastloss::cuda {

template <class Loss, class T, int kTeam, bool kBackward, bool kCluster>
struct HeldRow : StayingRow<Loss, T, kTeam, kBackward, kCluster> {
  using Base = StayingRow<Loss, T, kTeam, kBackward, kCluster>;
  using Base::a, Base::x, Base::lane, Base::unit;
  using Base::grad, Base::grads, Base::write_target;
  using Base::N, Base::kHold, Base::u_of, Base::to_u, Base::add_one, Base::add_vector, Base::add_classes;
  using typename Base::R, typename Base::Slope;

  struct Held {
    Vec<T> v[kHold > 0 ? kHold : 1];
    T tail;  // an element after the last whole vector: at most one for each thread
  };
  // Calls body(first class, vector) for each vector that this thread holds.
  template <int kFrom = 0, class Body>
  __device__ __forceinline__ void each_held(Held& held, Body body) const {
    if constexpr (kFrom < kHold) {  // recursion, not a loop: registers can be indexed by constants only
      const int64_t j = (lane + int64_t{kFrom} * kTeam) * N;
      if (j < a.n / N * N) body(j, held.v[kFrom]);
      each_held<kFrom + 1>(held, body);
    }
  }
  __device__ __forceinline__ int64_t tail_at() const { return a.n / N * N + lane; }
  __device__ __forceinline__ void hold(Held& held) const {
    if (kTeam > 32 || reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      each_held(held, [&](int64_t j, Vec<T>& v) { v = load16(x + j); });
    } else {
      each_held(held, [&](int64_t j, Vec<T>& v) { v = load16_any(x + j, x, x + a.n); });
    }
    if (tail_at() < a.n) held.tail = x[tail_at()];
  }
  // The sums vector by vector, as in a sweep over memory.
  __device__ __forceinline__ Online<Loss, R> sums_in_turn(Held& held) const {
    Online<Loss, R> o;
    each_held(held, [&](int64_t j, Vec<T>& v) { add_vector(o, j, v); });
    if (tail_at() < a.n) add_one(o, tail_at(), held.tail);
    return o;
  }
  // The maximum of the team first, then the sums relative to it.
  __device__ __forceinline__ Online<Loss, R> sums_of(Held& held) const {
    Online<Loss, R> o;
    R top = -INFINITY;
    each_held(held, [&](int64_t, const Vec<T>& v) {
      R u[N];
      widen_all(v, u);
      to_u(u);
#pragma unroll
      for (int k = 0; k < N; ++k) top = larger(u[k], top);
    });
    const bool more = tail_at() < a.n;
    if (more) top = larger(u_of(widen(held.tail)), top);
    o.m = team_max<kTeam>(top);
    each_held(held, [&](int64_t j, Vec<T>& v) {
      forget(v);
      R u[N];
      widen_all(v, u);
      to_u(u);
      add_classes(o, j, u);
    });
    if (more) {
      const R u[1] = {u_of(widen(held.tail))};
      add_classes(o, tail_at(), u);
    }
    return team_sum<kTeam>(o);
  }
  __device__ __forceinline__ void write(const Slope& s, T* dx, Held& held) const {
    each_held(held, [&](int64_t j, Vec<T>& v) {
      forget(v);
      store16(dx + j, grads(s, j, v));
    });
    if (tail_at() < a.n) dx[tail_at()] = grad(s, tail_at(), held.tail);
    write_target(s, dx, 0, a.n / N * N);
  }
};

}  // namespace fastloss::cuda
