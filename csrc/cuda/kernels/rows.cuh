// How a GPU walks rows of logits: a team of threads a row, value and gradient in one kernel.
//
// Device memory is read once and written once. A team is one thread where classes are strided (neighbouring
// threads then read neighbouring rows), 8 threads or a warp for short rows, a block for long ones. The most
// common losses hold a row of up to 32 KB in registers. Longer rows belong to blocks that stay: what fits of
// a row lies in shared memory, a little in registers, and while its gradient is written the next row is on
// its way into the room that becomes free; only what does not fit is read twice, the second time from L2.
// Each thread has a maximum and its sums; they are merged in an order that depends on the row's length alone,
// so results depend neither on the batch nor on where the row lies. No softmax is stored. The backward pass
// has kernels of its own: it only writes, and may go through many rows with few blocks.
#pragma once
#include "../../drivers/row_loss.h"
#include "../../drivers/rows.h"
#include "../../losses/number_token.h"
#include "../launch.cuh"
#include "../ptx.cuh"

namespace fastloss::cuda {

constexpr int kThreads = 128, kBlockTeam = 512;  // threads of a block: with small teams, as one team
constexpr unsigned kFullMask = 0xffffffffu;

// The lanes of this thread's warp that are in its team.
template <int kTeam>
__device__ __forceinline__ unsigned team_mask() {
  if constexpr (kTeam >= 32) return kFullMask;
  return ((1u << kTeam % 32) - 1) << (threadIdx.x % 32 & -kTeam);
}

// What an exponential is taken of: z - z' = (u - u') * unit, where u is the logit as it lies in memory unless
// it is capped, so that neither a class nor its exponential is multiplied by the scale for itself.
template <class R>
struct Unit {
  R of_z, of_two;  // of_two for exponents of two
  __device__ __forceinline__ explicit Unit(R unit) : of_z(unit), of_two(unit * R(1.4426950408889634)) {}
  __device__ __forceinline__ R distance(R below) const { return product(below, of_z); }
  __device__ __forceinline__ R exp_of(R below) const {  // e^(below * unit)
    if constexpr (sizeof(R) == 4) return exp2_approx(below * of_two);
    return exp(below * of_z);
  }
  // e^(below * unit - log_sum), where `logs` is kept(log_sum)
  __device__ __forceinline__ R kept(R log_sum) const {
    return sizeof(R) == 4 ? log_sum * R(1.4426950408889634) : log_sum;
  }
  __device__ __forceinline__ R share_of(R below, R logs) const {
    if constexpr (sizeof(R) == 4) return exp2_approx(fmaf(below, of_two, -logs));
    return exp(below * of_z - logs);
  }
};

// Running maximum of u, sum of exp(z - max) over all but the target, and what the loss adds up.
template <class Loss, class R>
struct Online {
  using Sums = typename Loss::template Sums<R>;
  static constexpr int kFields = std::is_empty_v<Sums> ? 0 : sizeof(Sums) / sizeof(R);
  R m = -INFINITY, s = 0;
  Sums extra{};

  // Whether what the loss adds up holds the sum of exponentials already: then s is left alone.
  static constexpr bool kOwnTotal = requires(const Sums& sums) { sums.total(); };

  __device__ __forceinline__ R base() const { return m == -INFINITY ? R(0) : m; }
  __device__ __forceinline__ void follow(R top, const Unit<R>& unit) {
    if (!(top > m)) return;
    if (m != -INFINITY) {
      const R shift = unit.distance(m - top), factor = kFields ? exp(shift) : unit.exp_of(m - top);
      if constexpr (kOwnTotal) {
        extra.move(shift, factor, extra.total());
      } else {
        extra.move(shift, factor, s);
        s *= factor;
      }
    }
    m = top;
  }
  // Adds another's sums, which are relative to the same maximum.
  __device__ __forceinline__ void take(const Online& o) {
    s += o.s;
    R mine[kFields + 1], theirs[kFields + 1];
    std::memcpy(mine, &extra, kFields * sizeof(R));
    std::memcpy(theirs, &o.extra, kFields * sizeof(R));
#pragma unroll
    for (int f = 0; f < kFields; ++f) mine[f] += theirs[f];
    std::memcpy(&extra, mine, kFields * sizeof(R));
  }
  // The sums of the lanes that differ in the bits from `offset` down; all have the same maximum.
  __device__ __forceinline__ Online added(int offset, unsigned mask = kFullMask) const {
    R all[kFields + 1];
    std::memcpy(all, &extra, kFields * sizeof(R));
    all[kFields] = s;
#pragma unroll
    for (; offset; offset /= 2)
#pragma unroll
      for (int f = 0; f <= kFields; ++f) all[f] += __shfl_xor_sync(mask, all[f], offset);
    Online o;
    o.m = m;
    o.s = all[kFields];
    std::memcpy(&o.extra, all, kFields * sizeof(R));
    return o;
  }
};

// All threads of the team get the merged value. Every thread of the block calls it.
template <int kTeam, class O>
__device__ __forceinline__ O team_merge(O o) {
  if constexpr (kTeam > 1) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) o.merge(o.from_lane(offset));
  }
  if constexpr (kTeam > 32) {
    FL_SHARED(O, part, kTeam / 32);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = o;
    __syncthreads();
    o = part[0];
    for (int w = 1; w < kTeam / 32; ++w) o.merge(part[w]);
  }
  return o;
}

// The same in two steps, in which each thread takes one exponential: all agree on the maximum, then, each
// having followed it, add up. Once each in a kernel: what is shared may still be read when they return.
template <int kTeam, class R>
__device__ __forceinline__ R team_max(R top) {
  constexpr int kWarps = kTeam / 32;
#pragma unroll
  for (int offset = kTeam < 32 ? kTeam / 2 : 16; offset; offset /= 2)
    top = larger(__shfl_xor_sync(team_mask<kTeam>(), top, offset), top);
  if constexpr (kWarps > 1) {
    FL_SHARED(R, tops, kWarps);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    top = tops[threadIdx.x % kWarps];
#pragma unroll
    for (int offset = kWarps / 2; offset; offset /= 2)
      top = larger(__shfl_xor_sync(kFullMask, top, offset), top);
  }
  return top;
}
template <int kTeam, class O>
__device__ __forceinline__ O team_sum(O o) {
  constexpr int kWarps = kTeam / 32;
  o = o.added(kTeam < 32 ? kTeam / 2 : 16, team_mask<kTeam>());
  if constexpr (kWarps > 1) {
    FL_SHARED(O, part, kWarps);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = o;
    __syncthreads();
    o = part[threadIdx.x % kWarps].added(kWarps / 2);
  }
  return o;
}

// Threads that a multiprocessor has room for: 64 registers each suffice where a gradient is a multiple of p.
template <class Loss>
constexpr int kResident = Loss::kProportional && !Loss::kNumbers ? 1024 : 512;

// Vectors of a short row that each thread of a team holds in its registers, so that nothing is read again for
// the gradient. Not where a logit is dear to compute twice, nor for the rarer losses.
template <class Loss, class T, int kTeam, bool kBackward>
constexpr int kHeld = kBackward || kTeam == 1 || 4 * kTeam > kResident<Loss> ||
                              sizeof(T) == 8 || Loss::kSoftcap || Loss::kSideStreams || Loss::kPlanes
                              || Loss::kNumbers
                          ? 0
                      : kTeam > 32 ? 8
                                   : 4;

// Whether blocks stay, each going on with another row when it is done with one, and keep what fits of it in
// shared memory. Capped logits are dear, and rare.
template <class Loss, class T, int kTeam, bool kBackward>
constexpr bool kStays =
    !kBackward && kTeam > 32 && !kHeld<Loss, T, kTeam, kBackward> && sizeof(T) < 8 && !Loss::kSoftcap;
// Vectors of such a row that each thread keeps in registers, after those in shared memory: 32 KB of a
// multiprocessor. With planes no forward pass writes a gradient: nothing is read a second time.
template <class Loss, class T, int kTeam, bool kBackward>
constexpr int kKept = kStays<Loss, T, kTeam, kBackward> && !Loss::kPlanes ? 2 * 1024 / kResident<Loss> : 0;

template <class Loss, class T, int kTeam, bool kBackward>
struct RowTeam {
  using R = acc_t<T>;
  static constexpr int N = Vec<T>::kSize;
  static constexpr int kInFlight = Loss::kSideStreams ? 2 : 4;  // loads on their way before the first use
  static constexpr int kHold = kHeld<Loss, T, kTeam, kBackward>;
  static constexpr bool kStay = kStays<Loss, T, kTeam, kBackward>;
  static constexpr int kKeep = kKept<Loss, T, kTeam, kBackward>;
  const RowArgs& a;
  const Loss loss;
  const int lane;
  const int64_t r;
  const T* x;
  const T* q;
  int64_t t;
  R scale, cap, inverse_cap;
  Unit<R> unit;
  bool flip;  // u is -x: the scale is negative; with teams of one thread alone
  // The first vectors of the row, on their way into shared memory, and those of the next one, which are sent
  // for where a vector was read for the last time. The thread that fills a slot is the one that reads it, so
  // that no barrier is needed.
  Vec<T>* cache;
  int slots;     // of it; 0: nothing is kept
  bool more;     // this block has another row,
  int64_t next;  //   which starts so many elements further on

  __device__ __forceinline__ bool capped() const { return Loss::kSoftcap && cap > 0; }
  // Rounded, so that z - m is the same wherever it is computed, and exactly 0 at the maximum.
  __device__ __forceinline__ R logit(R v) const {
    const R z = product(v, scale);
    return capped() ? product(cap, tanh(z * inverse_cap)) : z;
  }
  __device__ __forceinline__ R u_of(R v) const { return capped() ? logit(v) : kTeam == 1 && flip ? -v : v; }
  template <int kCount>
  __device__ __forceinline__ void to_u(R* v) const {
    if (!capped()) return;  // asked once for all
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] = u_of(v[k]);
  }
  __device__ __forceinline__ R
  bend(R v) const {  // of the cap; from v, since in z / cap two more roundings would be
    const R t = tanh(v * scale * inverse_cap);
    return (1 - t) * (1 + t);
  }
  __device__ __forceinline__ R weight(int64_t j) const {
    if constexpr (Loss::kSideStreams) return a.class_weight ? static_cast<const R*>(a.class_weight)[j] : R(1);
    return 1;
  }
  __device__ __forceinline__ R soft(int64_t j) const {
    if constexpr (Loss::kSideStreams) return q ? widen(q[j * a.q_layout.class_stride]) : R(0);
    return 0;
  }

  // Whether the target may be among kCount classes from j on. Threads of small teams, of which several make
  // up a warp, always ask: one team or another would take the branch. With planes no class is a target.
  template <int kCount>
  __device__ __forceinline__ bool asks(int64_t j) const {
    return !Loss::kPlanes && ((kTeam > 1 && kTeam < 32) || static_cast<uint64_t>(t - j) < kCount);
  }
  // Adds kCount classes from j on, of which the target is number `hit`; without kTarget it is none of them,
  // as in nearly all calls, and no class is asked.
  template <int kCount, bool kTarget>
  __device__ __forceinline__ void add_below(Online<Loss, R>& o, int64_t j, const R* u, R base,
                                            int hit) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      // a loss that adds up d too has that of which the exponential is taken: one number less to hold
      const R below = u[k] - base, d = unit.distance(below);
      const R e = kTarget && k == hit ? R(0) : Online<Loss, R>::kFields ? exp(d) : unit.exp_of(below);
      if constexpr (!Online<Loss, R>::kOwnTotal) o.s += e;
      o.extra.add(e, d, weight(j + k), soft(j + k), loss);
    }
  }
  // kCount classes by their u.
  template <int kCount>
  __device__ __forceinline__ void add(Online<Loss, R>& o, int64_t j, const R* u) const {
    R top = -INFINITY;
#pragma unroll
    for (int k = 0; k < kCount; ++k) top = larger(u[k], top);
    o.follow(top, unit);
    add_asking<kCount>(o, j, u);
  }
  template <int kCount>
  __device__ __forceinline__ void add_asking(Online<Loss, R>& o, int64_t j, const R* u) const {
    const R base = o.base();
    if (asks<kCount>(j)) {
      // any number that is none of theirs stands for a target further away
      const int64_t ahead = t - j;
      add_below<kCount, true>(o, j, u, base,
                              static_cast<uint64_t>(ahead) < kCount ? static_cast<int>(ahead) : -1);
    } else {
      add_below<kCount, false>(o, j, u, base, -1);
    }
  }
  __device__ __forceinline__ void add_one(Online<Loss, R>& o, int64_t j, T v) const {
    const R u = u_of(widen(v));
    add<1>(o, j, &u);
  }
  __device__ __forceinline__ void add_vector(Online<Loss, R>& o, int64_t j, const Vec<T>& v) const {
    R u[N];
    widen_all(v, u);
    to_u<N>(u);
    add<N>(o, j, u);
  }
  // The vectors after those in shared memory that stay in this thread's registers.
  struct Kept {
    Vec<T> v[kKeep > 0 ? kKeep : 1];
  };
  __device__ __forceinline__ int64_t kept_at(int u) const { return (slots + lane + int64_t{u} * kTeam) * N; }
  // Sends for the next row's vector of this slot, whose own is not needed any more.
  __device__ __forceinline__ void refill(int slot) const {
    if (more) __pipeline_memcpy_async(cache + slot, x + next + int64_t{slot} * N, 16);
  }
  __device__ __forceinline__ void refill_all() const {
    __pipeline_wait_prior(0);  // two copies into one slot have no order
    for (int slot = lane; slot < slots; slot += kTeam) refill(slot);
    __pipeline_commit();
  }
  // Adds what stays: slots in shared memory, then registers. Gives the first class after them.
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

  // ---- a short row in registers
  struct Held {
    Vec<T> v[kHold > 0 ? kHold : 1];
    T rest;  // of the elements after the last whole vector each thread has one at most
  };
  // Calls body(first class, vector) for each vector that this thread holds.
  template <int kFrom = 0, class Body>
  __device__ __forceinline__ void each_held(Held& held, Body body) const {
    if constexpr (kFrom < kHold) {  // no loop: registers are indexed by constants alone
      const int64_t j = (lane + int64_t{kFrom} * kTeam) * N;
      if (j < a.n / N * N) body(j, held.v[kFrom]);
      each_held<kFrom + 1>(held, body);
    }
  }
  __device__ __forceinline__ int64_t rest_at() const { return a.n / N * N + lane; }
  __device__ __forceinline__ void hold(Held& held) const {
    if (kTeam > 32 || reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      each_held(held, [&](int64_t j, Vec<T>& v) { v = load16(x + j); });
    } else {
      each_held(held, [&](int64_t j, Vec<T>& v) { v = load16_any(x + j, x, x + a.n); });
    }
    if (rest_at() < a.n) held.rest = x[rest_at()];
  }
  // One vector after the other, each as in a sweep of memory.
  __device__ __forceinline__ Online<Loss, R> sums_in_turn(Held& held) const {
    Online<Loss, R> o;
    each_held(held, [&](int64_t j, Vec<T>& v) { add_vector(o, j, v); });
    if (rest_at() < a.n) add_one(o, rest_at(), held.rest);
    return o;
  }
  // First the maximum of all, then the sums relative to it, merged.
  __device__ __forceinline__ Online<Loss, R> sums_of(Held& held) const {
    Online<Loss, R> o;
    R top = -INFINITY;
    each_held(held, [&](int64_t, const Vec<T>& v) {
      R u[N];
      widen_all(v, u);
      to_u<N>(u);
#pragma unroll
      for (int k = 0; k < N; ++k) top = larger(u[k], top);
    });
    const bool more = rest_at() < a.n;
    if (more) top = larger(u_of(widen(held.rest)), top);
    o.m = team_max<kTeam>(top);
    each_held(held, [&](int64_t j, Vec<T>& v) {
      forget(v);
      R u[N];
      widen_all(v, u);
      to_u<N>(u);
      add_asking<N>(o, j, u);
    });
    if (more) {
      const R u = u_of(widen(held.rest));
      add_asking<1>(o, rest_at(), &u);
    }
    return team_sum<kTeam>(o);
  }

  // g * d loss / d x for one class
  struct Slope {
    typename Loss::Coef coef;
    R m, log_sum;  // of z
    R top, logs;   // the maximum of u, and log_sum as `share_of` takes it
  };
  template <bool kTarget>
  __device__ __forceinline__ R slope_at(const Slope& s, int64_t j, R v) const {
    const R below = u_of(v) - s.top, p = unit.share_of(below, s.logs), d = unit.distance(below),
            w = weight(j);
    R dz = kTarget && j == t ? loss.target(p, d, w, s.coef) : loss.grad(p, d, w, soft(j), s.coef);
    if constexpr (Loss::kSoftcap)
      if (cap > 0) dz *= bend(v);
    return dz;
  }
  __device__ __forceinline__ T grad(const Slope& s, int64_t j, T v) const {
    return narrow<T>(slope_at<true>(s, j, widen(v)));
  }
  __device__ __forceinline__ Vec<T> grads(const Slope& s, int64_t j, const Vec<T>& v) const {
    R z[N];
    widen_all(v, z);
    if (asks<N>(j)) {
#pragma unroll
      for (int k = 0; k < N; ++k) z[k] = slope_at<true>(s, j + k, z[k]);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) z[k] = slope_at<false>(s, j + k, z[k]);
    }
    return narrow_all<T>(z);
  }
  // Of the longest rows it is better if the gradient leaves L2 first: what is read again lies there.
  __device__ __forceinline__ static void put(T* to, const Vec<T>& v) {
    if constexpr (kStay && kTeam == kResident<Loss>) {
      store16_first_out(to, v);
    } else {
      store16(to, v);
    }
  }
  // Writes the gradients of what stays and sends for the next row; gives the first class after them.
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
  __device__ __forceinline__ void write(const Slope& s, T* dx, Held& held) const {
    each_held(held, [&](int64_t j, Vec<T>& v) {
      forget(v);
      store16(dx + j, grads(s, j, v));
    });
    if (rest_at() < a.n) dx[rest_at()] = grad(s, rest_at(), held.rest);
  }
  __device__ __forceinline__ void write_row(const Slope& s, T* dx, Held& held, bool whole,
                                            const Kept& kept) const {
    if constexpr (kHold > 0)
      if (whole) return write(s, dx, held);
    write(s, dx, kept);
  }
  __device__ __forceinline__ void write_zeros(T* dx) const {
    for (int64_t j = lane; j < a.n; j += kTeam) dx[j * a.dx_layout.class_stride] = narrow<T>(R(0));
  }

  __device__ __forceinline__ R
  m_of(R top) const {  // rounded as `logit` is: what is asked for may be the maximum
    return product(top, unit.of_z);
  }
  __device__ __forceinline__ T* gradient() const { return static_cast<T*>(a.dx) + a.dx_layout.start(r); }
  // Asked for where it is needed: an address is two registers.
  __device__ __forceinline__ R* state() const { return static_cast<R*>(a.state) + r * a.state_width; }
  __device__ __forceinline__ void run() {
    const bool leader = lane == 0;
    t = a.target ? a.target[r] : -1;
    R k = 1;
    bool inside = true;  // a class that does not exist gives NaN and is never used as an index
    if constexpr (kBackward) {
      k = state()[2];
    } else {
      if (a.row_weight) k = static_cast<const R*>(a.row_weight)[r];
      if (a.target && t == a.ignore_index) k = 0;
    }
    if (a.target && (t < 0 || t >= a.n)) {
      inside = false;
      t = -1;
      if (k != 0) k = NAN;
    }
    if (k == 0) {
      if (!kBackward && leader) {
        for (int64_t i = 0; i < a.state_width; ++i) state()[i] = 0;
        if constexpr (Loss::kPlanes) {
          for (int64_t i = 0; i < a.planes; ++i) results()[i] = 0;
        } else {
          static_cast<R*>(a.loss)[r] = 0;
        }
      }
      if (a.dx) write_zeros(gradient());
      if (kStay && slots) refill_all();
      return;
    }
    // of a row that does not start on 16 bytes many vectors would take too many registers while being loaded
    const bool holds = kHold && (kTeam <= 32 || reinterpret_cast<uintptr_t>(x) % 16 == 0);
    const bool write_held =
        holds && a.dx && a.dx_layout.class_stride == 1 && reinterpret_cast<uintptr_t>(gradient()) % 16 == 0;
    Held held;
    if constexpr (kHold > 0)
      if (holds) hold(held);
    Kept kept;
    Target<R> target{a.target != nullptr, 0, 1};
    R ut = 0, top = 0;
    if (a.target && inside) {
      ut = u_of(widen(x[t * a.x_layout.class_stride]));
      if (a.class_weight) target.weight = static_cast<const R*>(a.class_weight)[t];
    }
    RowState<R> row;
    NumberTerm<R> number{};
    R g = 1;
    if constexpr (kBackward) {
      top = state()[0];
      row.log_sum = state()[1];
#pragma unroll
      for (int i = 0; i < Loss::kSaved; ++i) row.saved[i] = state()[3 + i];
      row.m = m_of(top);
      target.d = unit.distance(ut - top);
      if constexpr (Loss::kNumbers) number_term(row, number);
      if constexpr (!Loss::kPlanes) g = static_cast<const R*>(a.upstream)[r * a.upstream_stride];
    } else {
      Online<Loss, R> o;
      bool merged = kTeam == 1;
      if constexpr (kHold > 0 && kTeam <= 32) {
        o = sums_of(held);
        merged = true;
      } else if (holds) {
        o = sums_in_turn(held);
      } else {
        o = sweep(kept);
      }
      if (!merged) {
        o.follow(team_max<kTeam>(o.m), unit);
        o = team_sum<kTeam>(o);
      }
      if (a.target) add_small(o);
      top = o.base();
      row.m = m_of(top);
      target.d = unit.distance(ut - top);
      const R e = a.target ? unit.exp_of(ut - top) : R(0);
      row.log_sum = log(o.s + e);
      R value = loss.finish(row, o.extra, o.s, e, target);
      if constexpr (Loss::kNumbers) value += number_term(row, number);
      value *= k;
      if (a.norm) k /= *static_cast<const R*>(a.norm);
      if constexpr (Loss::kPlanes) write_asked(row);
      if (leader) {
        if constexpr (Loss::kPlanes) {
          loss.write(row, results());
        } else {
          static_cast<R*>(a.loss)[r] = value;
        }
        R* const own = state();
        own[0] = top;
        own[1] = row.log_sum;
        own[2] = k;
#pragma unroll
        for (int i = 0; i < Loss::kSaved; ++i) own[3 + i] = row.saved[i];
        for (int64_t i = 3 + Loss::kSaved; i < a.state_width; ++i) own[i] = 0;
      }
    }
    if (!a.dx) return;
    T* dx = gradient();
    if constexpr (Loss::kPlanes) {
      const Slope s{loss.coef(row, upstream(), a.asked_each, scale), row.m, row.log_sum, top,
                    unit.kept(row.log_sum)};
      write_row(s, dx, held, write_held, kept);
      asked_gradient(s, dx);
    } else {
      Slope s{loss.coef(row, target, g * k * scale), row.m, row.log_sum, top, unit.kept(row.log_sum)};
      if constexpr (Loss::kNumbers) loss.add(s.coef, g * k * scale * number.beside);
      write_row(s, dx, held, write_held, kept);
      if constexpr (Loss::kNumbers)
        if (number.total != 0) number_gradient(s, number, g * k * scale, dx);
    }
  }

  // ---- the term of a loss with numbers; every warp of a team computes it
  __device__ __forceinline__ const R* number_far() const {
    return static_cast<const R*>(a.number_table) + a.number_position[r] * a.numbers;
  }
  __device__ __forceinline__ R number_term(const RowState<R>& row, NumberTerm<R>& number) const {
    const R weight = static_cast<const R*>(a.number_weight)[r];
    if (weight == 0) return 0;  // the same for the whole team
    constexpr int kStep = kTeam < 32 ? kTeam : 32;
    const unsigned mask = team_mask<kTeam>();
    const R* far = number_far();
    R top = -INFINITY, total = 0, away = 0;
    for (int64_t k = lane % kStep; k < a.numbers; k += kStep) top = max(asked_logit(a.number_ids[k]), top);
#pragma unroll
    for (int offset = kStep / 2; offset; offset /= 2) top = max(__shfl_xor_sync(mask, top, offset), top);
    if (top == -INFINITY) top = 0;
    for (int64_t k = lane % kStep; k < a.numbers; k += kStep) {
      const R e = exp(asked_logit(a.number_ids[k]) - top);
      total += e;
      away += e * far[k];
    }
#pragma unroll
    for (int offset = kStep / 2; offset; offset /= 2) {
      total += __shfl_xor_sync(mask, total, offset);
      away += __shfl_xor_sync(mask, away, offset);
    }
    number = loss.numbers.term(weight, *static_cast<const R*>(a.number_worst), away / total, top, total,
                               row.m, row.log_sum);
    return number.value;
  }
  __device__ __forceinline__ void number_gradient(const Slope& s, const NumberTerm<R>& number, R g,
                                                  T* dx) const {
    if constexpr (kTeam > 1 && kTeam <= 32) __syncwarp(team_mask<kTeam>());
    if constexpr (kTeam > 32) __syncthreads();  // after the writes of `write`
    const R* far = number_far();
    for (int64_t k = lane; k < a.numbers; k += kTeam) {
      const int64_t j = a.number_ids[k];
      if (j < 0 || j >= a.n || (k && a.number_ids[k - 1] == j)) continue;
      const R z = asked_logit(j), d = z - s.m, p = exp(d - s.log_sum), e = exp(z - number.top);
      R dz = j == t ? loss.target(p, d, R(1), s.coef) : loss.grad(p, d, R(1), R(0), s.coef);
      for (int64_t same = k; same < a.numbers && a.number_ids[same] == j;
           ++same)  // it may stand there more than once
        dz += loss.numbers.own(number, e, p, far[same]) * g;
      dx[j * a.dx_layout.class_stride] = narrow<T>(dz);
    }
  }

  // ---- results of a loss with planes
  __device__ __forceinline__ Planes<R> results() const { return {static_cast<R*>(a.loss) + r, a.rows}; }
  __device__ __forceinline__ Planes<const R> upstream() const {
    return {static_cast<const R*>(a.upstream) + r, a.rows};
  }
  // NaN for a class that does not exist
  __device__ __forceinline__ R asked_logit(int64_t j) const {
    return j >= 0 && j < a.n ? logit(widen(x[j * a.x_layout.class_stride])) : R(NAN);
  }
  __device__ __forceinline__ void write_asked(const RowState<R>& row) const {
    const Planes<R> out = results();
    for (int64_t i = lane; i < a.asked_each; i += kTeam) {
      const R d = asked_logit(a.asked[r * a.asked_each + i]) - row.m;
      out[Loss::kPlanes + i] = d - row.log_sum;
      out[Loss::kPlanes + a.asked_each + i] = d == 0;
    }
  }
  __device__ __forceinline__ void asked_gradient(const Slope& s, T* dx) const {
    if constexpr (kTeam > 1 && kTeam <= 32) __syncwarp(team_mask<kTeam>());
    if constexpr (kTeam > 32) __syncthreads();  // after the writes of `write`
    const int64_t* asked = a.asked + r * a.asked_each;
    for (int64_t i = lane; i < a.asked_each; i += kTeam) {
      const int64_t j = asked[i];
      if (j < 0 || j >= a.n) continue;
      bool first = true;  // a class may be asked for more than once
      R g = 0;
      for (int64_t other = 0; other < a.asked_each; ++other) {
        if (asked[other] != j) continue;
        first = first && other >= i;
        g += upstream()[Loss::kPlanes + other];
      }
      if (!first) continue;
      const R z = asked_logit(j), d = z - s.m;
      R dz = loss.asked_for(exp(d - s.log_sum), d, g * scale, s.coef);
      if constexpr (Loss::kSoftcap)
        if (cap > 0) dz *= bend(widen(x[j * a.x_layout.class_stride]));
      dx[j * a.dx_layout.class_stride] = narrow<T>(dz);
    }
  }
};

// Blocks that a multiprocessor is to have room for.
template <class Loss, class T, int kTeam, bool kBackward>
constexpr int kBlocks = kHeld<Loss, T, kTeam, kBackward> ? (kTeam > 32 ? 640 / kTeam : 6)
                        : kTeam > 32                     ? kResident<Loss> / kTeam
                                                         : 4;

// With `slots` blocks stay: each goes on with another row as soon as it has written one.
template <class Loss, class T, int kTeam, bool kBackward>
__global__ void __launch_bounds__(kTeam > 32 ? kTeam : kThreads, kBlocks<Loss, T, kTeam, kBackward>)
    rows_kernel(RowArgs a, int slots) {
  using R = acc_t<T>;
  constexpr int kBlock = kTeam > 32 ? kTeam : kThreads;
  if (kBackward && a.skip_unit_upstream && *static_cast<const R*>(a.upstream) == 1) return;
  FL_DYN_SHARED(Vec<T>, cache);
  const int lane = threadIdx.x % kTeam;
  const T* const all = static_cast<const T*>(a.x);
  const R scale = R(a.logit_scale);
  const bool capped = Loss::kSoftcap && a.softcap > 0;
  const Unit<R> unit(capped ? R(1) : scale < 0 ? -scale : scale);
  const auto team = [&](int64_t r, int64_t step) {
    const T* q = a.q ? static_cast<const T*>(a.q) + a.q_layout.start(r) : nullptr;
    return RowTeam<Loss, T, kTeam, kBackward>{a,
                                              Loss(a.hparams, a.n),
                                              lane,
                                              r,
                                              all + a.x_layout.start(r),
                                              q,
                                              -1,
                                              scale,
                                              R(a.softcap),
                                              R(a.softcap > 0 ? 1 / a.softcap : 0),
                                              unit,
                                              scale < 0,
                                              cache,
                                              slots,
                                              slots && r + step < a.rows,
                                              a.x_layout.start(r + step) - a.x_layout.start(r)};
  };
  int64_t r = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / kTeam;
  const int64_t step = int64_t{gridDim.x} * (kBlock / kTeam);
  constexpr bool kStay = kStays<Loss, T, kTeam, kBackward>;
  if constexpr (kStay)
    if (slots) {
      for (int slot = lane; slot < slots; slot += kTeam)
        __pipeline_memcpy_async(cache + slot, all + a.x_layout.start(r) + int64_t{slot} * Vec<T>::kSize, 16);
      __pipeline_commit();
    }
#pragma unroll 1
  for (; r < a.rows; r += step) {  // whole teams
    team(r, step).run();
    if constexpr (kStay) __syncthreads();  // what `run` shares is used again
    if constexpr (!kBackward && !kStay) return;
  }
}

// Bytes of the longest rows for a warp, and of the longest that a block of half a multiprocessor's threads is
// given: longer ones go to a block of all its threads.
constexpr int64_t kWarpRowBytes = 4 << 10, kHalfRowBytes = 128 << 10;
// Threads for the shortest rows, if they hold them.
constexpr int kSmallTeam = 8;
// Threads that go through the rows where each block first asks whether there is anything to do: as many as a
// large GPU holds, so that the answer no costs little.
constexpr int64_t kAskingThreads = 132 * 2048;
// Shared memory of a multiprocessor that is not for keeping rows: what its blocks need beside.
constexpr int64_t kSharedBeside = 3 << 10;

// Whether every row of such a layout starts on 16 bytes.
template <class T>
bool on_vectors(const void* start, const RowLayout& l) {
  constexpr int64_t N = Vec<T>::kSize;
  return reinterpret_cast<uintptr_t>(start) % 16 == 0 && l.class_stride == 1 && l.outer_stride % N == 0 &&
         l.inner_stride % N == 0;
}

template <class Loss, class T, int kTeam, bool kBackward>
void launch_team(const RowArgs& a, cudaStream_t stream) {
  const int block = kTeam > 32 ? kTeam : kThreads;
  int64_t blocks = (a.rows * kTeam + block - 1) / block, slots = 0;
  if (kBackward && a.skip_unit_upstream && blocks > kAskingThreads / block) blocks = kAskingThreads / block;
  if (kStays<Loss, T, kTeam, kBackward> && on_vectors<T>(a.x, a.x_layout) &&
      (!a.dx || on_vectors<T>(a.dx, a.dx_layout))) {
    const int64_t row = a.n / Vec<T>::kSize,
                  room = (most_shared() - kSharedBeside) * kTeam / kResident<Loss> / 16;
    slots = (row < room ? row : room) / kTeam * kTeam;
    const int64_t stay = int64_t{multiprocessors()} * kBlocks<Loss, T, kTeam, kBackward>;
    if (slots && blocks > stay) blocks = stay;
  }
  const size_t shared = 16 * static_cast<size_t>(slots > 0 ? slots : 1);  // none is no array to point at
  start<&rows_kernel<Loss, T, kTeam, kBackward>>(blocks, block, shared, stream, a, static_cast<int>(slots));
}
template <class Loss, class T, bool kBackward>
void launch_pass(const RowArgs& a, cudaStream_t stream) {
  if (a.x_layout.class_stride != 1 || a.logit_scale < 0) return launch_team<Loss, T, 1, kBackward>(a, stream);
  if constexpr (sizeof(T) < 8) {  // float64 is there to be exact: a warp does for any length
    const int64_t bytes = a.n * int64_t{sizeof(T)};
    constexpr int kMost = kResident<Loss>;
    constexpr auto held = [](int team, int vectors) { return int64_t{16} * team * vectors; };
    constexpr int kOfTeam = kHeld<Loss, T, 128, kBackward>, kOfWarp = kHeld<Loss, T, 32, kBackward>;
    if constexpr (kBackward) {  // each class on its own: not worth more kernels
      if (bytes > kWarpRowBytes) return launch_team<Loss, T, kMost / 2, kBackward>(a, stream);
    } else {
      if (bytes > kHalfRowBytes) return launch_team<Loss, T, kMost, kBackward>(a, stream);
      if constexpr (Loss::kSoftcap) {  // rare
        if (bytes > kWarpRowBytes) return launch_team<Loss, T, kMost / 2, kBackward>(a, stream);
      }
      if (bytes > (kOfTeam && kMost == 1024 ? held(256, kOfTeam) : held(128, 8)))
        return launch_team<Loss, T, kMost / 2, kBackward>(a, stream);
      if constexpr (kOfTeam && kMost == 1024)
        if (bytes > held(128, kOfTeam)) return launch_team<Loss, T, 256, kBackward>(a, stream);
      if (bytes > (kOfWarp ? held(32, kOfWarp) : kWarpRowBytes))
        return launch_team<Loss, T, 128, kBackward>(a, stream);
    }
    if constexpr (kOfWarp > 0)
      if (bytes <= held(kSmallTeam, kOfWarp)) return launch_team<Loss, T, kSmallTeam, kBackward>(a, stream);
  }
  launch_team<Loss, T, 32, kBackward>(a, stream);
}
template <class Loss, class T>
void launch_rows(const RowArgs& a, cudaStream_t stream) {
  if (a.pass == RowPass::backward) return launch_pass<Loss, T, true>(a, stream);
  launch_pass<Loss, T, false>(a, stream);
}

}  // namespace fastloss::cuda
