// A team of threads for each pair of rows of logits: a warp for short rows, a block for long ones. The first
// sweep reads both from device memory; the next ones, for the divergence and for the gradients, hit in L1 or
// L2. The order of sums depends on the row's length alone.
#include "../../losses/distillation.h"
#include "../../math/online_softmax.h"
#include "../launchers.h"
#include "rows.cuh"

namespace fastloss::cuda {
namespace {

constexpr int kBlockTeam = 512;  // threads for a long row

// Of student and teacher; `other` is the other row's logit of a row's most probable class, the largest of several.
template <class R>
struct Normalisers {
  OnlineSoftmax<R> of[2];
  R other[2] = {-INFINITY, -INFINITY};

  __device__ __forceinline__ void take(int i, R top, R z) {
    if (top > of[i].top || (top == of[i].top && z > other[i])) other[i] = z;
  }
  template <class Exp>
  __device__ __forceinline__ void push(R student, R teacher, Exp exp_of) {
    take(0, student, teacher);
    take(1, teacher, student);
    of[0].push(student, exp_of);
    of[1].push(teacher, exp_of);
  }
  __device__ __forceinline__ void merge(const Normalisers& o) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      take(i, o.of[i].top, o.other[i]);
      of[i].merge(o.of[i]);
    }
  }
};
template <class R>
struct TwoSums {
  R a = 0, b = 0;
  __device__ __forceinline__ void merge(const TwoSums& o) {
    a += o.a;
    b += o.b;
  }
};

// Calls body(index, student's element, teacher's element) for this thread's classes, in a fixed order.
template <class T, int kTeam, class Body>
__device__ __forceinline__ void each_class(const T* x, const T* q, int64_t n, int lane, Body body) {
  constexpr int N = Vec<T>::kSize;
  const int64_t whole = n / N * N;
  for (int64_t j = int64_t{lane} * N; j < whole; j += kTeam * N) {
    const Vec<T> student = load16_any(x + j, x, x + n), teacher = load16_any(q + j, q, q + n);
#pragma unroll
    for (int k = 0; k < N; ++k) body(j + k, student.v[k], teacher.v[k]);
  }
  for (int64_t j = whole + lane; j < n; j += kTeam) body(j, x[j], q[j]);
}

template <class T, int kKind, int kTeam>
__global__ void __launch_bounds__(kTeam > 32 ? kTeam : kThreads, kTeam > 32 ? 1 : 4)
    divergence_kernel(DivergenceArgs args) {
  using R = acc_t<T>;
  constexpr int kBlock = kTeam > 32 ? kTeam : kThreads;
  const RowArgs& a = args.rows;
  if (a.skip_unit_upstream && *static_cast<const R*>(a.upstream) == 1) return;
  const int64_t r = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / kTeam, n = a.n;
  if (r >= a.rows) return;  // whole warps
  const int lane = static_cast<int>(threadIdx.x % kTeam);
  const T* x = static_cast<const T*>(a.x) + a.x_layout.start(r);
  const T* q = static_cast<const T*>(a.q) + a.q_layout.start(r);
  T* dx = a.dx ? static_cast<T*>(a.dx) + r * n : nullptr;
  T* dq = args.dq ? static_cast<T*>(args.dq) + r * n : nullptr;
  R* state = static_cast<R*>(a.state) + r * kDivergenceState;
  const bool backward = a.pass == RowPass::backward, leader = lane == 0;
  const R scale = R(a.logit_scale);
  const LogitDivergence<R, kKind> loss(a.hparams);
  R k = backward ? state[8] : a.row_weight ? static_cast<const R*>(a.row_weight)[r] : R(1);
  if (k == 0) {
    if (leader && !backward) {
      for (int i = 0; i < kDivergenceState; ++i) state[i] = 0;
      static_cast<R*>(a.loss)[r] = 0;
    }
    for (int64_t j = lane; j < n; j += kTeam) {
      if (dx) dx[j] = narrow<T>(R(0));
      if (dq) dq[j] = narrow<T>(R(0));
    }
    return;
  }
  R m[2], sum[2], top_u, top_v, rest_a, rest_b, g = 1;  // of student and teacher
  const auto prob = [&](int side, T v) {
    return full_exp(rounded(widen(v) * scale) - m[side]) * (1 / sum[side]);
  };
  const auto of_logits = [&](R student, R teacher) {
    return loss.log_ratios(student - m[0], teacher - m[1], log(sum[1]) - log(sum[0]));
  };
  const auto log_ratios = [&](T student, T teacher) {
    return of_logits(rounded(widen(student) * scale), rounded(widen(teacher) * scale));
  };
  if (backward) {
    m[0] = state[0];
    sum[0] = state[1];
    m[1] = state[2];
    sum[1] = state[3];
    top_u = state[4];
    top_v = state[5];
    rest_a = state[6];
    rest_b = state[7];
    g = static_cast<const R*>(a.upstream)[r * a.upstream_stride];
  } else {
    Normalisers<R> o;
    const auto full = [](R z) { return full_exp(z); };
    each_class<T, kTeam>(x, q, n, lane, [&](int64_t, T student, T teacher) {
      o.push(rounded(widen(student) * scale), rounded(widen(teacher) * scale), full);
    });
    o = block_reduce<kTeam>(o, Merge{});
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[i] = o.of[i].base();
      sum[i] = o.of[i].sum;
    }
    top_u = loss.finite(of_logits(o.other[1], m[1]).u);
    top_v = loss.finite(of_logits(m[0], o.other[0]).v);
    TwoSums<R> sums;
    each_class<T, kTeam>(x, q, n, lane, [&](int64_t, T student, T teacher) {
      const auto s = log_ratios(student, teacher);
      if constexpr (kKind != kReverse) sums.a += loss.weighed(prob(1, teacher), s.u - top_u);
      if constexpr (kKind != kForward) sums.b += loss.weighed(prob(0, student), s.v - top_v);
    });
    sums = block_reduce<kTeam>(sums, Merge{});
    rest_a = sums.a;
    rest_b = sums.b;
    const R value = k * loss.loss(top_u + rest_a, top_v + rest_b);
    if (a.norm) k /= *static_cast<const R*>(a.norm);
    if (leader) {
      static_cast<R*>(a.loss)[r] = value;
      state[0] = m[0];
      state[1] = sum[0];
      state[2] = m[1];
      state[3] = sum[1];
      state[4] = top_u;
      state[5] = top_v;
      state[6] = rest_a;
      state[7] = rest_b;
      state[8] = k;
    }
  }
  if (!dx && !dq) return;
  g *= k * scale;
  each_class<T, kTeam>(x, q, n, lane, [&](int64_t j, T student, T teacher) {
    const R p = prob(1, teacher), q_ = prob(0, student);
    const auto s = log_ratios(student, teacher);
    if (dx) dx[j] = narrow<T>(loss.by_student(p, q_, s.v, top_v, rest_b, g));
    if (dq) dq[j] = narrow<T>(loss.by_teacher(p, q_, s.u, top_u, rest_a, g));
  });
}

template <class T, int kKind, int kTeam>
void launch_team(const DivergenceArgs& a, cudaStream_t stream) {
  const int block = kTeam > 32 ? kTeam : kThreads;
  const int64_t blocks = (a.rows.rows * kTeam + block - 1) / block;
  launch_1d<&divergence_kernel<T, kKind, kTeam>>(blocks, block, 0, stream, a);
}
template <class T, int kKind>
void launch_type(const DivergenceArgs& a, cudaStream_t stream) {
  if constexpr (sizeof(T) < 8)
    if (a.rows.n * int64_t{sizeof(T)} > kWarpRowBytes) return launch_team<T, kKind, kBlockTeam>(a, stream);
  launch_team<T, kKind, 32>(a, stream);
}
template <int kKind>
void launch_kind(const DivergenceArgs& a, cudaStream_t stream) {
  with_device_type(a.rows.dtype, [&]<class T> { launch_type<T, kKind>(a, stream); });
}

}  // namespace

void divergence(const DivergenceArgs& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.rows.variant == kForward) return launch_kind<kForward>(a, s);
  if (a.rows.variant == kReverse) return launch_kind<kReverse>(a, s);
  launch_kind<kMixture>(a, s);
}

}  // namespace fastloss::cuda
