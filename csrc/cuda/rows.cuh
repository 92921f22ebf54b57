// How a GPU walks rows of logits: a team of threads a row, value and gradient in one kernel.
//
// Device memory is read once and written once: the second sweep, for the gradient, finds the row in L1 or L2.
// A team is one thread where classes are strided (neighbouring threads then read neighbouring rows), a warp
// for short rows, a block for long ones. Each thread keeps a running maximum and its sums; they are merged in
// an order that depends on the row's length alone, so results do not depend on the batch. No softmax is
// stored.
#pragma once
#include "../core/row_loss.h"
#include "../core/rows.h"
#include "../losses/number_token.h"
#include "start.cuh"

namespace fastloss::cuda {

constexpr int kThreads = 128, kBlockTeam = 512;  // threads of a block: with small teams, as one team
constexpr unsigned kFullMask = 0xffffffffu;

// Running maximum, sum of exp(z - max) over all but the target, and what the loss adds up.
template <class Loss, class R>
struct Online {
  using Sums = typename Loss::template Sums<R>;
  static constexpr int kFields = std::is_empty_v<Sums> ? 0 : sizeof(Sums) / sizeof(R);
  R m = -INFINITY, s = 0;
  Sums extra{};

  __device__ __forceinline__ R base() const { return m == -INFINITY ? R(0) : m; }
  __device__ __forceinline__ void follow(R top) {
    if (!(top > m)) return;
    if (m != -INFINITY) {
      const R shift = m - top, factor = exp(shift);
      extra.move(shift, factor, s);
      s *= factor;
    }
    m = top;
  }
  __device__ __forceinline__ void merge(Online o) {
    follow(o.m);
    o.follow(m);
    s += o.s;
    R mine[kFields + 1], theirs[kFields + 1];
    std::memcpy(mine, &extra, kFields * sizeof(R));
    std::memcpy(theirs, &o.extra, kFields * sizeof(R));
#pragma unroll
    for (int f = 0; f < kFields; ++f) mine[f] += theirs[f];
    std::memcpy(&extra, mine, kFields * sizeof(R));
  }
  __device__ __forceinline__ Online from_lane(int offset) const {
    Online o;
    o.m = __shfl_xor_sync(kFullMask, m, offset);
    o.s = __shfl_xor_sync(kFullMask, s, offset);
    R fields[kFields + 1];
    std::memcpy(fields, &extra, kFields * sizeof(R));
#pragma unroll
    for (int f = 0; f < kFields; ++f) fields[f] = __shfl_xor_sync(kFullMask, fields[f], offset);
    std::memcpy(&o.extra, fields, kFields * sizeof(R));
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

template <class Loss, class T, int kTeam>
struct RowTeam {
  using R = acc_t<T>;
  static constexpr int N = Vec<T>::kSize;
  static constexpr int kInFlight = Loss::kSideStreams ? 2 : 4;  // loads on their way before the first use
  const RowArgs& a;
  const Loss loss;
  const int lane;
  const int64_t r;
  const T* x;
  const T* q;
  int64_t t;
  R scale, cap, inverse_cap;

  __device__ __forceinline__ R logit(R v) const {
    const R z = v * scale;
    if constexpr (Loss::kSoftcap)
      if (cap > 0) return cap * tanh(z * inverse_cap);
    return z;
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

  template <int kCount>
  __device__ __forceinline__ void add(Online<Loss, R>& o, int64_t j, const T* v) const {
    R z[kCount], top = -INFINITY;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      z[k] = logit(widen(v[k]));
      top = max(z[k], top);
    }
    o.follow(top);
    const R base = o.base();
    const int64_t ahead = t - j;
    const int hit = ahead >= 0 && ahead < kCount ? static_cast<int>(ahead) : -1;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const R d = z[k] - base, e = k == hit ? R(0) : exp(d);
      o.s += e;
      o.extra.add(e, d, weight(j + k), soft(j + k), loss);
    }
  }
  __device__ __forceinline__ Online<Loss, R> sweep() const {
    Online<Loss, R> o;
    const int64_t n = a.n, stride = a.x_layout.class_stride;
    if (kTeam == 1 || stride != 1) {
      for (int64_t j = lane; j < n; j += kTeam) add<1>(o, j, x + j * stride);
      return o;
    }
    // by index, not by address: which thread adds what must not depend on where the row lies
    const int64_t body = n / N * N;
    const T* end = x + n;
    int64_t j = int64_t{lane} * N;
    for (; j + (kInFlight - 1) * kTeam * N < body; j += kInFlight * kTeam * N) {
      Vec<T> v[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) v[u] = load16_any(x + j + u * kTeam * N, x, end);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) add<N>(o, j + u * kTeam * N, v[u].v);
    }
    for (; j < body; j += kTeam * N) {
      const Vec<T> v = load16_any(x + j, x, end);
      add<N>(o, j, v.v);
    }
    for (j = body + lane; j < n; j += kTeam) add<1>(o, j, x + j);
    return o;
  }

  // g * d loss / d x for one class
  struct Slope {
    typename Loss::Coef coef;
    R m, log_sum;
  };
  __device__ __forceinline__ T grad(const Slope& s, int64_t j, T v) const {
    const R z = logit(widen(v)), d = z - s.m, p = exp(d - s.log_sum), w = weight(j);
    R dz = j == t ? loss.target(p, d, w, s.coef) : loss.grad(p, d, w, soft(j), s.coef);
    if constexpr (Loss::kSoftcap)
      if (cap > 0) dz *= bend(widen(v));
    return narrow<T>(dz);
  }
  __device__ __forceinline__ void write(const Slope& s, T* dx) const {
    const int64_t n = a.n, from = a.x_layout.class_stride, to = a.dx_layout.class_stride;
    if (kTeam == 1 || from != 1 || to != 1) {
      for (int64_t j = lane; j < n; j += kTeam) dx[j * to] = grad(s, j, x[j * from]);
      return;
    }
    const int64_t head = elements_to_boundary(dx, n), body = head + (n - head) / N * N;
    for (int64_t j = lane; j < head; j += kTeam) dx[j] = grad(s, j, x[j]);
    for (int64_t j = head + int64_t{lane} * N; j < body; j += kTeam * N) {
      Vec<T> v = load16_any(x + j, x, x + n);
#pragma unroll
      for (int k = 0; k < N; ++k) v.v[k] = grad(s, j + k, v.v[k]);
      store16(dx + j, v);
    }
    for (int64_t j = body + lane; j < n; j += kTeam) dx[j] = grad(s, j, x[j]);
  }
  __device__ __forceinline__ void write_zeros(T* dx) const {
    for (int64_t j = lane; j < a.n; j += kTeam) dx[j * a.dx_layout.class_stride] = narrow<T>(R(0));
  }

  __device__ __forceinline__ void run() {
    R* state = static_cast<R*>(a.state) + r * a.state_width;
    const bool backward = a.pass == RowPass::backward, leader = lane == 0;
    T* dx = a.dx ? static_cast<T*>(a.dx) + a.dx_layout.start(r) : nullptr;
    t = a.target ? a.target[r] : -1;
    R k = 1;
    bool inside = true;  // a class that does not exist gives NaN and is never used as an index
    if (backward) {
      k = state[2];
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
      if (!backward && leader) {
        for (int64_t i = 0; i < a.state_width; ++i) state[i] = 0;
        if constexpr (Loss::kPlanes) {
          for (int64_t i = 0; i < a.planes; ++i) results()[i] = 0;
        } else {
          static_cast<R*>(a.loss)[r] = 0;
        }
      }
      if (dx) write_zeros(dx);
      return;
    }
    Target<R> target{a.target != nullptr, 0, 1};
    R zt = 0;
    if (a.target && inside) {
      zt = logit(widen(x[t * a.x_layout.class_stride]));
      if (a.class_weight) target.weight = static_cast<const R*>(a.class_weight)[t];
    }
    RowState<R> row;
    NumberTerm<R> number{};
    R g = 1;
    if (backward) {
      row.m = state[0];
      row.log_sum = state[1];
#pragma unroll
      for (int i = 0; i < Loss::kSaved; ++i) row.saved[i] = state[3 + i];
      target.d = zt - row.m;
      if constexpr (Loss::kNumbers) number_term(row, number);
      if constexpr (!Loss::kPlanes) g = static_cast<const R*>(a.upstream)[r * a.upstream_stride];
    } else {
      const Online<Loss, R> o = team_merge<kTeam>(sweep());
      row.m = o.base();
      target.d = zt - row.m;
      const R e = a.target ? exp(target.d) : R(0);
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
        state[0] = row.m;
        state[1] = row.log_sum;
        state[2] = k;
#pragma unroll
        for (int i = 0; i < Loss::kSaved; ++i) state[3 + i] = row.saved[i];
        for (int64_t i = 3 + Loss::kSaved; i < a.state_width; ++i) state[i] = 0;
      }
    }
    if (!dx) return;
    if constexpr (Loss::kPlanes) {
      const Slope s{loss.coef(row, upstream(), a.asked_each, scale), row.m, row.log_sum};
      write(s, dx);
      asked_gradient(s, dx);
    } else {
      Slope s{loss.coef(row, target, g * k * scale), row.m, row.log_sum};
      if constexpr (Loss::kNumbers) loss.add(s.coef, g * k * scale * number.beside);
      write(s, dx);
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
    constexpr int kStep = kTeam >= 32 ? 32 : 1;
    const R* far = number_far();
    R top = -INFINITY, total = 0, away = 0;
    for (int64_t k = lane % kStep; k < a.numbers; k += kStep) top = max(asked_logit(a.number_ids[k]), top);
#pragma unroll
    for (int offset = kStep / 2; offset; offset /= 2) top = max(__shfl_xor_sync(kFullMask, top, offset), top);
    if (top == -INFINITY) top = 0;
    for (int64_t k = lane % kStep; k < a.numbers; k += kStep) {
      const R e = exp(asked_logit(a.number_ids[k]) - top);
      total += e;
      away += e * far[k];
    }
#pragma unroll
    for (int offset = kStep / 2; offset; offset /= 2) {
      total += __shfl_xor_sync(kFullMask, total, offset);
      away += __shfl_xor_sync(kFullMask, away, offset);
    }
    number = loss.numbers.term(weight, *static_cast<const R*>(a.number_worst), away / total, top, total,
                               row.m, row.log_sum);
    return number.value;
  }
  __device__ __forceinline__ void number_gradient(const Slope& s, const NumberTerm<R>& number, R g,
                                                  T* dx) const {
    if constexpr (kTeam == 32) __syncwarp();
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
    if constexpr (kTeam == 32) __syncwarp();
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
      if (cap > 0) dz *= bend(widen(x[j * a.x_layout.class_stride]));
      dx[j * a.dx_layout.class_stride] = narrow<T>(dz);
    }
  }
};

template <class Loss, class T, int kTeam>
__global__ void __launch_bounds__(kTeam > 32 ? kTeam : kThreads, kTeam > 32 ? 1 : 4) rows_kernel(RowArgs a) {
  using R = acc_t<T>;
  constexpr int kBlock = kTeam > 32 ? kTeam : kThreads;
  if (a.skip_unit_upstream && *static_cast<const R*>(a.upstream) == 1) return;
  const int64_t r = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / kTeam;
  if (r >= a.rows) return;  // whole warps, or with teams of one thread no collective follows
  const T* x = static_cast<const T*>(a.x) + a.x_layout.start(r);
  const T* q = a.q ? static_cast<const T*>(a.q) + a.q_layout.start(r) : nullptr;
  RowTeam<Loss, T, kTeam>{a,
                          Loss(a.options, a.n),
                          int(threadIdx.x % kTeam),
                          r,
                          x,
                          q,
                          -1,
                          R(a.logit_scale),
                          R(a.softcap),
                          R(a.softcap > 0 ? 1 / a.softcap : 0)}
      .run();
}

constexpr int64_t kWarpRowBytes = 4096;

template <class Loss, class T, int kTeam>
void launch_team(const RowArgs& a, cudaStream_t stream) {
  const int block = kTeam > 32 ? kTeam : kThreads;
  const int64_t blocks = (a.rows * kTeam + block - 1) / block;
  start<&rows_kernel<Loss, T, kTeam>>(blocks, block, 0, stream, a);
}
template <class Loss, class T>
void launch_rows(const RowArgs& a, cudaStream_t stream) {
  if (a.x_layout.class_stride != 1) return launch_team<Loss, T, 1>(a, stream);
  if constexpr (sizeof(T) < 8)  // float64 is there to be exact: a warp does for any length
    if (a.n * int64_t{sizeof(T)} > kWarpRowBytes) return launch_team<Loss, T, kBlockTeam>(a, stream);
  launch_team<Loss, T, 32>(a, stream);
}

}  // namespace fastloss::cuda
