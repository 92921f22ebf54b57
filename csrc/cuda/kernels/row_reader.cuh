// One row of logits as a thread of a team processes it: how much of the row stays on the chip, and the sums
// and the gradient of a few classes at a time, whether they come from registers, shared or device memory.
#pragma once
#include "../../drivers/rows.h"
#include "../launch.cuh"
#include "../ptx.cuh"
#include "row_sums.cuh"

namespace fastloss::cuda {

constexpr int kThreads = 128;  // of a block with several teams

// Threads resident on a multiprocessor: 64 registers each suffice where a gradient is a multiple of p, and
// where none is written.
template <class Loss, bool kBackward>
constexpr int kResident =
    (kBackward ? Loss::kProportional && !Loss::kNumberTokens : Loss::kProportional || Loss::kOutputs) ? 1024
                                                                                                      : 512;

// Vectors of a short row that each thread of a team holds in its registers, so that nothing is read again for
// the gradient. Not where a logit is expensive to compute twice, nor for the rarer losses.
template <class Loss, class T, int kTeam, bool kBackward>
constexpr int kHeld = kBackward || kTeam == 1 || 4 * kTeam > kResident<Loss, kBackward> ||
                              sizeof(T) == 8 || Loss::kSoftcap || Loss::kSideStreams || Loss::kOutputs
                              || Loss::kNumberTokens
                          ? 0
                      : kTeam > 32 ? 8
                                   : 4;

// Whether blocks are persistent: each takes another row when it is done with one, and keeps in shared memory
// what fits of it. Not for capped logits, which are expensive and rare, nor with kOutputs: no forward pass
// writes a gradient, so that nothing is read a second time.
template <class Loss, class T, int kTeam, bool kBackward>
constexpr bool kStays = !kBackward && kTeam > 32 && !kHeld<Loss, T, kTeam, kBackward> && sizeof(T) < 8 &&
                        !Loss::kSoftcap && !Loss::kOutputs;
// Vectors of such a row that each thread keeps in registers, after those in shared memory: 32 KB of a
// multiprocessor, or less of it where registers are short.
template <class Loss, class T, int kTeam, bool kBackward>
consteval int vectors_kept() {
  if (!kStays<Loss, T, kTeam, kBackward>) return 0;
  if (Loss::kNumberTokens || Loss::kSideStreams) return 1;
  return (Loss::kSaved > 1 ? 1024 : 2048) / kResident<Loss, kBackward>;
}
template <class Loss, class T, int kTeam, bool kBackward>
constexpr int kKept = vectors_kept<Loss, T, kTeam, kBackward>();

// Long rows of a team of 1024 consist of parts, each no longer than what a block keeps of it if it has 227 KB of
// shared memory, as far as kMostParts suffice. Each part has sums of its own, which are merged in order: a
// cluster of blocks takes a part each, a single block one after the other, with the same result. Rows of which
// a block keeps two thirds are still one part: reading the rest again costs less than blocks that wait.
constexpr int64_t kWholeBytes = 384 << 10, kPartBytes = 256 << 10;
constexpr int kMostParts = 4;
template <class Loss, class T, int kTeam, bool kBackward>
constexpr bool kParted = kStays<Loss, T, kTeam, kBackward> && kTeam == 1024 && !Loss::kNumberTokens;
__host__ __device__ __forceinline__ int parts_of(int64_t bytes) {
  return bytes <= kWholeBytes ? 1 : bytes <= 2 * kPartBytes ? 2 : kMostParts;
}
// Classes of every part but the last, which has the others: whole lines of 128 bytes.
template <class T>
__host__ __device__ __forceinline__ int64_t part_classes(int64_t n) {
  constexpr int64_t kLine = 128 / sizeof(T);
  const auto lines = [n](int64_t parts) { return (n + parts * kLine - 1) / (parts * kLine); };
  const int parts = parts_of(n * int64_t{sizeof(T)});
  return parts == 1 ? n : kLine * (parts == 2 ? lines(2) : lines(kMostParts));
}

// The gradient of row r's result.
template <class T>
__device__ __forceinline__ acc_t<T> upstream_of(const RowArgs& a, int64_t r) {
  if (a.narrow_upstream) return widen(*static_cast<const T*>(a.upstream));
  return static_cast<const acc_t<T>*>(a.upstream)[r * a.upstream_stride];
}

// Whether a block may bring the rows of its threads, of one thread each, to shared memory and take their
// gradients from there. Not for losses that read logits again after their gradients are written.
template <class Loss, int kTeam>
constexpr bool kTiles = kTeam == 1 && !Loss::kOutputs && !Loss::kNumberTokens;

template <class Loss, class T, int kTeam, bool kBackward, bool kCluster>
struct RowReader {
  using R = acc_t<T>;
  static constexpr int N = Vec<T>::kSize;
  static constexpr int kInFlight = Loss::kSideStreams ? 2 : 4;  // loads in flight before the first use
  static constexpr int kHold = kHeld<Loss, T, kTeam, kBackward>;
  static constexpr bool kStay = kStays<Loss, T, kTeam, kBackward>;
  static constexpr int kKeep = kKept<Loss, T, kTeam, kBackward>;
  static constexpr bool kParts = kParted<Loss, T, kTeam, kBackward>;
  const RowArgs& a;
  const Loss loss;
  const int lane;
  const int64_t r;
  const T* x;
  const T* q;
  int64_t t;
  R scale, cap, inverse_cap;
  Unit<R> unit;
  bool flip;  // the scale is negative, and u is -x; only with teams of one thread
  // Shared memory for the first vectors of the row, filled by asynchronous copies. As soon as a slot has
  // been read for the last time, the next row's vector is copied into it. A slot is filled and read by the
  // same thread, so that no barrier is needed. With kTiles x may be a column of a tile, which the gradient
  // overwrites.
  Vec<T>* cache;
  int slots;     // vectors in cache; 0: none
  bool more;     // this block has another row,
  int64_t next;  //   which starts so many elements further on
  // In a cluster, the classes from x on that this block has, as if they were the row. t is the target among them.
  int64_t part;

  __device__ __forceinline__ int64_t classes() const { return kCluster ? part : a.n; }

  __device__ __forceinline__ bool in_tile() const { return kTiles<Loss, kTeam> && slots; }
  // Whether a part of the row stays on the chip. Then it starts on 16 bytes, and so does its gradient.
  __device__ __forceinline__ bool stays() const { return kStay && (kCluster || slots); }
  // From one class to the next.
  __device__ __forceinline__ int64_t x_stride() const {
    return in_tile() ? kThreads : a.x_layout.class_stride;
  }
  __device__ __forceinline__ int64_t dx_stride() const {
    return in_tile() ? kThreads : a.dx_layout.class_stride;
  }
  // The classes of a row of one thread: in device memory, or a column of the tile, which the compiler then
  // knows to be in shared memory at constant distances.
  template <class P>
  struct Strided {
    P* p;
    int64_t stride;
    __device__ __forceinline__ P& operator[](int64_t j) const { return p[j * stride]; }
  };
  struct Column {
    T* p;
    __device__ __forceinline__ T& operator[](int64_t j) const { return p[static_cast<int>(j) * kThreads]; }
  };
  __device__ __forceinline__ Column column() const { return {reinterpret_cast<T*>(cache) + threadIdx.x}; }
  __device__ __forceinline__ bool capped() const { return Loss::kSoftcap && cap > 0; }
  // Rounded, so that z - m is the same wherever it is computed, and exactly 0 at the maximum.
  __device__ __forceinline__ R logit(R v) const {
    const R z = product(v, scale);
    return capped() ? product(cap, tanh(z * inverse_cap)) : z;
  }
  __device__ __forceinline__ R u_of(R v) const { return capped() ? logit(v) : kTeam == 1 && flip ? -v : v; }
  template <int kCount>
  __device__ __forceinline__ void to_u(R (&v)[kCount]) const {
    if (!capped()) return;  // one branch for all
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] = u_of(v[k]);
  }
  __device__ __forceinline__ R
  bend(R v) const {  // the cap's derivative; from v: from z / cap it would carry two more roundings
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
  // up a warp, always say yes: one team or another would take the branch. With kOutputs no class is a target.
  template <int kCount>
  __device__ __forceinline__ bool may_hold_target(int64_t j) const {
    return !Loss::kOutputs && (kTeam < 32 || static_cast<uint64_t>(t - j) < kCount);
  }
  // The target's place among kCount classes from j on; no number below kCount: it is none of them.
  template <int kCount>
  __device__ __forceinline__ int place_of_target(int64_t j) const {
    if ((kTeam < 32 && kHold) || in_tile())
      return static_cast<int>(t) - static_cast<int>(j);  // rows are short
    const int64_t ahead = t - j;
    return static_cast<uint64_t>(ahead) < kCount ? static_cast<int>(ahead) : -1;
  }
  // Adds kCount classes from j on, of which the target is number `hit`. Without kTarget nothing is compared.
  template <int kCount, bool kTarget>
  __device__ __forceinline__ void add_below(Online<Loss, R>& o, int64_t j, const R* u, R base,
                                            int hit) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      // a loss that also adds d takes the exponential of d: one register less
      const R below = u[k] - base, d = unit.distance(below);
      const R e = kTarget && k == hit ? R(0) : Online<Loss, R>::kFields ? exp(d) : unit.exp_of(below);
      if constexpr (!Online<Loss, R>::kHasTotal) o.s += e;
      o.extra.add(e, d, weight(j + k), soft(j + k), loss);
    }
  }
  // Adds kCount classes, given by their u, and follows their maximum.
  template <int kCount>
  __device__ __forceinline__ void add(Online<Loss, R>& o, int64_t j, const R (&u)[kCount]) const {
    R top = -INFINITY;
#pragma unroll
    for (int k = 0; k < kCount; ++k) top = larger(u[k], top);
    o.follow(top, unit);
    add_classes(o, j, u);
  }
  template <int kCount>
  __device__ __forceinline__ void add_classes(Online<Loss, R>& o, int64_t j, const R (&u)[kCount]) const {
    const R base = o.base();
    // Whatever only the target needs is kept small: a row in registers has it once for each vector, and all
    // of it has to stay in the instruction cache.
    if constexpr (Online<Loss, R>::kFields == 0) {
      R e[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) e[k] = unit.exp_of(u[k] - base);
      if (may_hold_target<kCount>(j)) {
        const int hit = place_of_target<kCount>(j);
#pragma unroll
        for (int k = 0; k < kCount; ++k)
          if (k == hit) e[k] = 0;
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) o.s += e[k];
    } else if (may_hold_target<kCount>(j)) {
      add_below<kCount, true>(o, j, u, base, place_of_target<kCount>(j));
    } else {
      add_below<kCount, false>(o, j, u, base, -1);
    }
  }
  __device__ __forceinline__ void add_one(Online<Loss, R>& o, int64_t j, T v) const {
    const R u[1] = {u_of(widen(v))};
    add(o, j, u);
  }
  __device__ __forceinline__ void add_vector(Online<Loss, R>& o, int64_t j, const Vec<T>& v) const {
    R u[N];
    widen_all(v, u);
    to_u(u);
    add(o, j, u);
  }

  // What g * d loss / d x of a class needs of the row.
  struct Slope {
    typename Loss::GradCoef coef;
    R m, log_sum;     // of z
    R top, logs;      // the maximum of u, and log_sum as `prob_of` takes it
    R at_target = 0;  // the gradient of the target
  };
  template <bool kTarget>
  __device__ __forceinline__ R slope_at(const Slope& s, int64_t j, R v) const {
    const R below = u_of(v) - s.top, p = unit.prob_of(below, s.logs), d = unit.distance(below), w = weight(j);
    R dz = kTarget ? loss.grad_at_target(p, d, w, s.coef) : loss.grad(p, d, w, soft(j), s.coef);
    if constexpr (Loss::kSoftcap)
      if (cap > 0) dz *= bend(v);
    return dz;
  }
  // As if the class were not the target, whose gradient is written afterwards.
  __device__ __forceinline__ T grad(const Slope& s, int64_t j, T v) const {
    return narrow<T>(slope_at<false>(s, j, widen(v)));
  }
  __device__ __forceinline__ Vec<T> grads(const Slope& s, int64_t j, const Vec<T>& v) const {
    R z[N];
    widen_all(v, z);
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] = slope_at<false>(s, j + k, z[k]);
    return narrow_all<T>(z);
  }
  // The target's gradient over what was written there: by the same thread, whose later write wins. Each thread
  // has written one class after the other up to `head`, then vectors up to `body`, then single classes again.
  template <class To>
  __device__ __forceinline__ void write_target(const Slope& s, const To& to, int64_t head,
                                               int64_t body) const {
    if (Loss::kOutputs || t < 0 || t >= classes()) return;  // none, or in another part of the row
    const int64_t turn = t < head ? t : t < body ? (t - head) / N : t - body;
    if (kTeam == 1 || turn % kTeam == lane) to[t] = narrow<T>(s.at_target);
  }
  // The gradient of the longest rows is evicted from L2 first: L2 holds the logits that are read again.
  __device__ __forceinline__ static void put(T* to, const Vec<T>& v) {
    if constexpr (kStay && kTeam == kResident<Loss, kBackward>) {
      store16_first_out(to, v);
    } else {
      store16(to, v);
    }
  }
  __device__ __forceinline__ void write_zeros(T* dx) const {
    for (int64_t j = lane; j < classes(); j += kTeam) dx[j * dx_stride()] = narrow<T>(R(0));
  }
  // NaN for a class that does not exist
  __device__ __forceinline__ R logit_of_class(int64_t j) const {
    return j >= 0 && j < a.n ? logit(widen(x[j * x_stride()])) : R(NAN);
  }
};

}  // namespace fastloss::cuda
