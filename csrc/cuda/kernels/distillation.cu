// A team of threads for each pair of rows of logits: a warp for short rows, a block for long ones. The first
// sweep reads both from device memory; the next ones, for the divergence and for the gradients, hit in L1 or
// L2. The student's gradient of a forward divergence is written in the second. The order of sums depends on
// the row's length alone.
#include "../../losses/distillation.h"
#include "../../math/online_softmax.h"
#include "../launchers.h"
#include "rows.cuh"

namespace fastloss::cuda {
namespace {

constexpr int kBlockTeam = 512;  // threads for a long row

// Of student and teacher; `other` is the other row's logit of a row's most probable class, the largest of
// several.
template <class R>
struct Normalisers {
  OnlineSoftmax<R> of[2];
  R other[2] = {-INFINITY, -INFINITY};

  // Adds kCount classes. Their maximum is rarely as large as all before: then no class is looked at twice.
  template <int kCount>
  __device__ __forceinline__ void push(int i, const R (&z)[kCount], const R (&theirs)[kCount]) {
    R top = -INFINITY;
#pragma unroll
    for (int k = 0; k < kCount; ++k) top = larger(z[k], top);
    if (top >= of[i].top) {
      if (top > of[i].top) {
        if (of[i].top != -INFINITY) of[i].sum *= exp(of[i].top - top);
        of[i].top = top;
        other[i] = -INFINITY;
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (z[k] == top) other[i] = larger(theirs[k], other[i]);
    }
    const R base = of[i].base();
#pragma unroll
    for (int k = 0; k < kCount; ++k) of[i].sum += full_exp(z[k] - base);
  }
  __device__ __forceinline__ void merge(const Normalisers& o) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const R top = o.of[i].top;
      if (top > of[i].top || (top == of[i].top && o.other[i] > other[i])) other[i] = o.other[i];
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

// Two rows of logits, contiguous, as one thread of a team sees them.
template <class T, int kTeam>
struct RowPair {
  using R = acc_t<T>;
  static constexpr int N = Vec<T>::kSize;
  static constexpr int kInFlight = 2;  // vectors of each row that are loaded before the first use
  const T *student, *teacher;
  int64_t n;
  int lane;
  R scale;

  template <int kCount, class Body>
  __device__ __forceinline__ void pass(int64_t j, const R (&s)[kCount], const R (&t)[kCount],
                                       Body body) const {
    R zs[kCount], zt[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      zs[k] = product(s[k], scale);
      zt[k] = product(t[k], scale);
    }
    body(j, zs, zt);
  }
  template <class Body>
  __device__ __forceinline__ void pass(int64_t j, const Vec<T>& s, const Vec<T>& t, Body body) const {
    R ws[N], wt[N];
    widen_all(s, ws);
    widen_all(t, wt);
    pass(j, ws, wt, body);
  }
  // Calls body(j, the student's logits, the teacher's) for this thread's classes, 16 bytes of each row at a
  // time, in an order that depends on n alone.
  template <class Body>
  __device__ __forceinline__ void each_class(Body body) const {
    constexpr int64_t kStep = int64_t{kTeam} * N;
    const int64_t whole = n / N * N;
    int64_t j = int64_t{lane} * N;
    if ((reinterpret_cast<uintptr_t>(student) | reinterpret_cast<uintptr_t>(teacher)) % 16 == 0) {
#pragma unroll 1
      for (; j + (kInFlight - 1) * kStep < whole; j += kInFlight * kStep) {
        Vec<T> s[kInFlight], t[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          s[u] = load16(student + j + u * kStep);
          t[u] = load16(teacher + j + u * kStep);
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) pass(j + u * kStep, s[u], t[u], body);
      }
    }
#pragma unroll 1
    for (; j < whole; j += kStep)
      pass(j, load16_any(student + j, student, student + n), load16_any(teacher + j, teacher, teacher + n),
           body);
#pragma unroll 1
    for (j = whole + lane; j < n; j += kTeam) {
      const R s[1] = {widen(student[j])}, t[1] = {widen(teacher[j])};
      pass(j, s, t, body);
    }
  }
};
// The number of elements of an array, from its type.
template <class A>
constexpr int kCountOf = std::extent_v<std::remove_reference_t<A>>;

// A row of a gradient. It is evicted from L2 first: L2 holds the logits that are read again.
template <class T>
struct GradientRow {
  T* to;  // null: not wanted
  bool on_vector;
  __device__ __forceinline__ explicit GradientRow(T* row)
      : to(row), on_vector(reinterpret_cast<uintptr_t>(row) % 16 == 0) {}
  template <int kCount>
  __device__ __forceinline__ void write(int64_t j, const acc_t<T> (&g)[kCount]) const {
    if constexpr (kCount > 1) {
      if (on_vector) return store16_first_out(to + j, narrow_all<T>(g));
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) to[j + k] = narrow<T>(g[k]);
  }
};

template <class T, int kKind, int kTeam>
__device__ __forceinline__ void divergence_of_row(const DivergenceArgs& args, int64_t r) {
  using R = acc_t<T>;
  const RowArgs& a = args.rows;
  const int64_t n = a.n;
  const int lane = static_cast<int>(threadIdx.x % kTeam);
  const R scale = R(a.logit_scale);
  const RowPair<T, kTeam> pair{static_cast<const T*>(a.x) + a.x_layout.start(r),
                               static_cast<const T*>(a.q) + a.q_layout.start(r), n, lane, scale};
  const GradientRow<T> dx(a.dx ? static_cast<T*>(a.dx) + r * n : nullptr),
      dq(args.dq ? static_cast<T*>(args.dq) + r * n : nullptr);
  R* state = static_cast<R*>(a.state) + r * kDivergenceState;
  const bool backward = a.pass == RowPass::backward, leader = lane == 0;
  const LogitDivergence<R, kKind> loss(a.hparams);
  R k = backward ? state[8] : a.row_weight ? static_cast<const R*>(a.row_weight)[r] : R(1);
  if (k == 0) {
    if (leader && !backward) {
      for (int i = 0; i < kDivergenceState; ++i) state[i] = 0;
      static_cast<R*>(a.loss)[r] = 0;
    }
    for (int64_t j = lane; j < n; j += kTeam) {
      if (dx.to) dx.to[j] = narrow<T>(R(0));
      if (dq.to) dq.to[j] = narrow<T>(R(0));
    }
    return;
  }
  R m[2], sum[2], top_u, top_v, rest_a, rest_b, g = 1;  // of student and teacher
  Normalisers<R> o;
  if (backward) {
    m[0] = state[0];
    sum[0] = state[1];
    m[1] = state[2];
    sum[1] = state[3];
    top_u = state[4];
    top_v = state[5];
    rest_a = state[6];
    rest_b = state[7];
    g = upstream_of<T>(a, r);
  } else {
    pair.each_class([&](int64_t, const auto& student, const auto& teacher) {
      o.push(0, student, teacher);
      o.push(1, teacher, student);
    });
    o = block_reduce<kTeam>(o, Merge{});
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[i] = o.of[i].base();
      sum[i] = o.of[i].sum;
    }
  }
  // once for the row: a division and two logarithms
  const R inverse[2] = {1 / sum[0], 1 / sum[1]}, log_sums = log(sum[1]) - log(sum[0]);
  // a product: equal probabilities have to cancel
  const auto prob = [&](int side, R z) { return product(full_exp(z - m[side]), inverse[side]); };
  const auto log_ratios = [&](R student, R teacher) {
    return loss.log_ratios(student - m[0], teacher - m[1], log_sums);
  };
  // The student's gradient of a forward divergence needs none of its sums: it is written with them.
  const bool at_once = kKind == kForward && !backward && dx.to;
  if (!backward) {
    top_u = loss.finite(log_ratios(o.other[1], m[1]).u);
    top_v = loss.finite(log_ratios(m[0], o.other[0]).v);
    const R weight = k;
    if (a.norm) k /= *static_cast<const R*>(a.norm);
    g = k * scale;
    TwoSums<R> sums;
    const auto add = [&](R student, R teacher, R p) {
      const auto s = log_ratios(student, teacher);
      if constexpr (kKind != kReverse) sums.a += loss.weighed(p, s.u - top_u);
      if constexpr (kKind != kForward) sums.b += loss.weighed(prob(0, student), s.v - top_v);
    };
    if (at_once) {
      if constexpr (kKind == kForward)
        pair.each_class([&](int64_t j, const auto& student, const auto& teacher) {
          R to_student[kCountOf<decltype(student)>];
#pragma unroll
          for (int c = 0; c < kCountOf<decltype(student)>; ++c) {
            const R p = prob(1, teacher[c]);
            add(student[c], teacher[c], p);
            to_student[c] = loss.by_student(p, prob(0, student[c]), R(0), top_v, R(0), g);
          }
          dx.write(j, to_student);
        });
    } else {
      pair.each_class([&](int64_t, const auto& student, const auto& teacher) {
#pragma unroll
        for (int c = 0; c < kCountOf<decltype(student)>; ++c)
          add(student[c], teacher[c], kKind != kReverse ? prob(1, teacher[c]) : R(0));
      });
    }
    sums = block_reduce<kTeam>(sums, Merge{});
    rest_a = sums.a;
    rest_b = sums.b;
    if (leader) {
      static_cast<R*>(a.loss)[r] = weight * loss.loss(top_u + rest_a, top_v + rest_b);
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
  } else {
    g *= k * scale;
  }
  const bool write_dx = dx.to && !at_once;
  if (!write_dx && !dq.to) return;
  pair.each_class([&](int64_t j, const auto& student, const auto& teacher) {
    R to_student[kCountOf<decltype(student)>], to_teacher[kCountOf<decltype(student)>];
#pragma unroll
    for (int c = 0; c < kCountOf<decltype(student)>; ++c) {
      const R p = prob(1, teacher[c]), q = prob(0, student[c]);
      const auto s = log_ratios(student[c], teacher[c]);
      to_student[c] = loss.by_student(p, q, s.v, top_v, rest_b, g);
      to_teacher[c] = loss.by_teacher(p, q, s.u, top_u, rest_a, g);
    }
    if (write_dx) dx.write(j, to_student);
    if (dq.to) dq.write(j, to_teacher);
  });
}

template <class T, int kKind, int kTeam>
__global__ void __launch_bounds__(kTeam > 32 ? kTeam : kThreads, kTeam > 32 ? 1 : 4)
    divergence_kernel(DivergenceArgs args) {
  constexpr int kBlock = kTeam > 32 ? kTeam : kThreads;
  const RowArgs& a = args.rows;
  if (a.skip_unit_upstream && upstream_of<T>(a, 0) == 1) return;
  // For whole teams. A backward pass may have fewer teams than rows; it reduces nothing, so that no shared
  // memory is used again.
#pragma unroll 1
  for (int64_t r = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / kTeam; r < a.rows;
       r += int64_t{gridDim.x} * (kBlock / kTeam))
    divergence_of_row<T, kKind, kTeam>(args, r);
}

template <class T, int kKind, int kTeam>
void launch_team(const DivergenceArgs& a, cudaStream_t stream) {
  const int block = kTeam > 32 ? kTeam : kThreads;
  int64_t blocks = (a.rows.rows * kTeam + block - 1) / block;
  if (a.rows.skip_unit_upstream) blocks = blocks_to_skip(blocks, block);
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
