// CTC on CUDA: a block for each sequence goes through its steps, a thread for each position of the target;
// then a block for each row of the gradient. The input of a thread's first position is loaded one step
// ahead, as it depends on no other position. The sum of a class adds its positions in order, whatever the
// block size.
#include "../../losses/ctc.h"
#include "../launch.cuh"
#include "../launchers.h"
#include "../reduce.cuh"

namespace fastloss::cuda {
namespace {

constexpr int kRowThreads = 128;
constexpr int kMaxThreads = 512;                 // of a sequence
constexpr size_t kMaxShared = size_t{96} << 10;  // longer targets go through global memory

template <class T>
struct Sequence : AlignedTarget {
  using R = acc_t<T>;
  const AlignmentArgs& a;
  const int64_t n, width;

  __device__ __forceinline__ Sequence(const AlignmentArgs& args, int64_t n_)
      : AlignedTarget(args, n_), a(args), n(n_), width(2 * args.width + 1) {}
  __device__ __forceinline__ R* alpha(int64_t t) const {
    return static_cast<R*>(a.alpha) + (n * a.steps + t) * width;
  }
  __device__ __forceinline__ R* posterior(int64_t t) const {
    return static_cast<R*>(a.posterior) + (n * a.steps + t) * width;
  }
  __device__ __forceinline__ R* row(int64_t t) const { return static_cast<R*>(a.rows) + t * a.batch + n; }
  __device__ __forceinline__ R x(int64_t t, int64_t k) const {
    if (!in_range(k)) return R(NAN);
    return widen(static_cast<const T*>(a.input)[t * a.input_strides[0] + n * a.input_strides[1] + k]);
  }
  __device__ __forceinline__ R y(int64_t t, int64_t s) const { return x(t, label(s)) - *row(t); }
  __device__ __forceinline__ R its_likelihood() const {
    return likelihood(steps > 0 ? alpha(steps - 1) : static_cast<const R*>(nullptr));
  }
};

template <class R>
__device__ __forceinline__ R max_of_warp(R top) {
  top = warp_reduce(top, Max{});
  return top > -R(INFINITY) ? top : R(0);  // 0 of NaN too
}

// A warp for each row of the input: the maximum over the target's classes, and of logits also log sum exp.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 4) rows_kernel(AlignmentArgs a) {
  using R = acc_t<T>;
  const int64_t row = (int64_t{blockIdx.x} * kRowThreads + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= a.steps * a.batch) return;  // for whole warps
  const int64_t t = row / a.batch;
  const Sequence<T> q(a, row % a.batch);
  R top = max(q.x(t, q.blank), -R(INFINITY));
  for (int64_t i = lane; i < q.length; i += 32) top = max(q.x(t, q.labels[i]), top);
  top = max_of_warp(top);
  if (lane == 0) *q.row(t) = top;
  if (!a.from_logits) return;
  R row_max = -R(INFINITY), sum = 0;
  for (int64_t k = lane; k < a.classes; k += 32) row_max = max(q.x(t, k), row_max);
  row_max = max_of_warp(row_max);
  for (int64_t k = lane; k < a.classes; k += 32) sum += exp(q.x(t, k) - row_max);
  sum = warp_sum(sum);
  if (lane == 0) *q.row(a.steps + t) = row_max + log(sum);
}

// The inputs of a thread's first position that depend on no other position, loaded one step ahead.
template <class T>
struct Ahead {
  using R = acc_t<T>;
  const Sequence<T>& q;
  const bool mine;
  const int64_t label;
  R y = 0, alpha = 0;

  __device__ __forceinline__ explicit Ahead(const Sequence<T>& sequence)
      : q(sequence), mine(threadIdx.x < q.positions), label(mine ? q.label(threadIdx.x) : 0) {}
  __device__ __forceinline__ void load(int64_t t, bool with_alpha) {
    if (!mine || t < 0 || t >= q.steps) return;
    y = q.x(t, label) - *q.row(t);
    if (with_alpha) alpha = q.alpha(t)[threadIdx.x];
  }
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) alpha_kernel(AlignmentArgs a, bool in_shared) {
  using R = acc_t<T>;
  FL_DYN_SHARED(R, rows);
  const Sequence<T> q(a, blockIdx.x);
  const int64_t threads = blockDim.x;
  const R nothing = -R(INFINITY);
  Ahead<T> ahead(q);
  ahead.load(0, false);
  for (int64_t t = 0; t < q.steps; ++t) {
    const R first = ahead.y;
    ahead.load(t + 1, false);
    R* const out = q.alpha(t);
    R* const now = in_shared ? rows + t % 2 * q.width : out;
    const R* const before = in_shared ? rows + (t + 1) % 2 * q.width : q.alpha(t > 0 ? t - 1 : 0);
    for (int64_t s = threadIdx.x; s < q.positions; s += threads) {
      const R y = s == threadIdx.x ? first : q.y(t, s);
      R v = s < 2 ? y : y + nothing;
      if (t > 0)
        v = y + log_sum(before[s], s >= 1 ? before[s - 1] : nothing, q.skips(s) ? before[s - 2] : nothing);
      now[s] = v;
      if (in_shared) out[s] = v;
    }
    __syncthreads();
  }
  if (threadIdx.x >= 32) return;
  double log_scale = 0;  // added by one warp, whatever the block size
  for (int64_t t = threadIdx.x; t < q.steps; t += 32)
    log_scale += (a.from_logits ? *q.row(a.steps + t) : R(0)) - *q.row(t);
  log_scale = warp_sum(log_scale);
  if (threadIdx.x != 0) return;
  R loss = R(log_scale - q.its_likelihood());
  if (a.zero_infinity && loss == R(INFINITY)) loss = 0;
  static_cast<R*>(a.loss)[q.n] = loss;
}

// Also links the positions of a class: for each label 2 (1 + the next label that equals it, or 0), and 1
// more if it is the first such.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) posterior_kernel(AlignmentArgs a, bool in_shared) {
  using R = acc_t<T>;
  FL_DYN_SHARED(R, rows);
  const Sequence<T> q(a, blockIdx.x);
  const int64_t threads = blockDim.x;
  const R nothing = -R(INFINITY), likelihood = q.its_likelihood();
  for (int64_t i = threadIdx.x; i < q.length; i += threads) {
    int64_t next = i + 1, first = 1;
    while (next < q.length && q.labels[next] != q.labels[i]) ++next;
    for (int64_t j = 0; j < i; ++j)
      if (q.labels[j] == q.labels[i]) first = 0;
    a.links[q.n * a.width + i] = 2 * (next < q.length ? next + 1 : 0) + first;
  }
  Ahead<T> ahead(q);
  ahead.load(q.steps - 1, true);
  R* const betas = in_shared ? rows : static_cast<R*>(a.betas) + q.n * 2 * q.width;
  for (int64_t t = q.steps - 1; t >= 0; --t) {
    const bool last = t == q.steps - 1;
    const R first = ahead.y, first_alpha = ahead.alpha;
    ahead.load(t - 1, true);
    R* const now = betas + t % 2 * q.width;
    const R* const behind = betas + (t + 1) % 2 * q.width;
    for (int64_t s = threadIdx.x; s < q.positions; s += threads) {
      const bool is_first = s == threadIdx.x;
      R after = s >= q.positions - 2 ? R(0) : nothing;
      if (!last)
        after = log_sum(behind[s], s + 1 < q.positions ? behind[s + 1] : nothing,
                        q.skips(s + 2) ? behind[s + 2] : nothing);
      q.posterior(t)[s] = posterior(is_first ? first_alpha : q.alpha(t)[s], after, likelihood);
      now[s] = beta(after, is_first ? first : q.y(t, s));
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) gradient_kernel(AlignmentArgs a) {
  using R = acc_t<T>;
  const int64_t row = blockIdx.x, t = row / a.batch;
  const Sequence<T> q(a, row % a.batch);
  T* const out = static_cast<T*>(a.gradient) + t * a.gradient_strides[0] + q.n * a.gradient_strides[1];
  const bool none = q.its_likelihood() == -R(INFINITY), counts = t < q.steps && !(none && a.zero_infinity);
  const R g = none ? R(NAN) : static_cast<const R*>(a.upstream)[q.n];
  const R z = a.from_logits ? *q.row(a.steps + t) : R(0);
  const auto p = [&](int64_t k) { return a.from_logits ? exp(q.x(t, k) - z) : R(0); };
  for (int64_t k = threadIdx.x; k < a.classes; k += kRowThreads) out[k] = narrow<T>(counts ? g * p(k) : R(0));
  const R* const posterior = q.posterior(counts ? t : 0);
  R blank = 0;
  for (int64_t s = threadIdx.x; counts && s < q.positions; s += kRowThreads)
    if (q.label(s) == q.blank) blank += posterior[s];
  blank = block_sum<kRowThreads>(blank);  // its barrier: all of `out` has been written
  if (!counts) return;
  if (threadIdx.x == 0) out[q.blank] = narrow<T>(g * (p(q.blank) - blank));
  for (int64_t i = threadIdx.x; i < q.length; i += kRowThreads) {
    const int64_t *const links = a.links + q.n * a.width, k = q.labels[i];
    if (links[i] % 2 == 0 || k == q.blank || !q.in_range(k)) continue;
    R sum = 0;
    for (int64_t j = i; j >= 0; j = links[j] / 2 - 1) sum += posterior[2 * j + 1];
    out[k] = narrow<T>(g * (p(k) - sum));
  }
}

template <class T>
void run(const AlignmentArgs& a, cudaStream_t stream) {
  const int64_t width = 2 * a.width + 1, rows = a.steps * a.batch;
  const int threads = static_cast<int>(width < kMaxThreads ? (width + 31) / 32 * 32 : kMaxThreads);
  const size_t rows_bytes = 2 * static_cast<size_t>(width) * sizeof(acc_t<T>);
  const bool in_shared = rows_bytes <= kMaxShared;
  const size_t shared = in_shared ? rows_bytes : 0;
  if (a.backward) {
    launch_1d<&posterior_kernel<T>>(a.batch, threads, shared, stream, a, in_shared);
    return launch_1d<&gradient_kernel<T>>(rows, kRowThreads, 0, stream, a);
  }
  launch_1d<&rows_kernel<T>>((rows * 32 + kRowThreads - 1) / kRowThreads, kRowThreads, 0, stream, a);
  launch_1d<&alpha_kernel<T>>(a.batch, threads, shared, stream, a, in_shared);
}

}  // namespace

void alignment(const AlignmentArgs& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  with_device_type(args.dtype, [&]<class T> { run<T>(args, s); });
}

}  // namespace fastloss::cuda
