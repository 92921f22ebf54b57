// Elementwise losses on CUDA: value and gradients in one kernel, in which each thread takes 16 bytes of every
// tensor at a time. Every input is read once, and only requested outputs are written. If there are several
// blocks, one more block adds their sums in a fixed order.
#pragma once
#include "../../drivers/elements.h"
#include "../launch.cuh"
#include "../reduce.cuh"

namespace fastloss::cuda {

constexpr int kElementThreads = 256, kTileVectors = 4, kSumThreads = 1024;

template <class T>
constexpr int64_t kTile = int64_t{kElementThreads} * kTileVectors * Vec<T>::kSize;

template <class T>
__device__ __forceinline__ void write_result(const ElementArgs& a, double sum) {
  using R = acc_t<T>;
  const double divisor = a.divisor * (a.norm ? double(*static_cast<const R*>(a.norm)) : 1.0);
  const R result = static_cast<R>(sum / divisor);
  if (a.out_acc) {
    *static_cast<R*>(a.result) = result;
  } else {
    *static_cast<T*>(a.result) = narrow<T>(result);
  }
}

template <class T>
__device__ __forceinline__ acc_t<T> element(const ElementArgs& a, const ElementInput& x, int64_t i) {
  using R = acc_t<T>;
  const int64_t row = x.inner == 1 ? i : x.period == 1 ? 0 : i / x.inner;  // divided only where it must be
  if (x.source == Source::one_hot || x.source == Source::not_ignored) {
    const int64_t c = static_cast<const int64_t*>(x.p)[row];
    if (x.source == Source::not_ignored) return c == a.ignore_index ? R(0) : R(1);
    // a class that does not exist gives NaN and is never used as an index
    if ((c < 0 || c >= x.inner) && c != a.ignore_index && c != a.background_index) return R(NAN);
    return c == i - row * x.inner && c != a.background_index ? R(1) : R(0);
  }
  const int64_t at = row < x.period ? row : row % x.period;
  if (x.source == Source::flag) return static_cast<const uint8_t*>(x.p)[at] ? R(1) : R(0);
  return x.source == Source::accumulation ? static_cast<const R*>(x.p)[at]
                                          : widen(static_cast<const T*>(x.p)[at]);
}
__device__ __forceinline__ bool flat(const ElementArgs& a, const ElementInput& x) {
  return x.source == Source::element && x.inner == 1 && x.period >= a.n;
}
__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// kCount elements from i on: 16 bytes, or one.
template <class T, int kCount>
__device__ __forceinline__ void read(const ElementArgs& a, const ElementInput& x, int64_t i, acc_t<T>* v) {
  if (kCount > 1 && flat(a, x)) {
    const Vec<T> raw = load16(static_cast<const T*>(x.p) + i);
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] = widen(raw.v[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) v[k] = element<T>(a, x, i + k);
}
template <class T, int kCount>
__device__ __forceinline__ void write(void* p, int64_t i, const acc_t<T>* v) {
  T* to = static_cast<T*>(p) + i;
  if constexpr (kCount > 1) {
    Vec<T> raw;
#pragma unroll
    for (int k = 0; k < kCount; ++k) raw.v[k] = narrow<T>(v[k]);
    store16(to, raw);
  } else {
    *to = narrow<T>(*v);
  }
}

template <class Loss, class T>
struct ElementThread {
  using R = acc_t<T>;
  static constexpr int N = Vec<T>::kSize;
  const ElementArgs& a;
  const Loss loss;
  R k;             // factor of the gradients
  R sum, product;  // sum of log(1 + u) = log(1 + product)

  template <int kCount>
  __device__ __forceinline__ void step(int64_t i) {
    R v[Loss::kInputs][kCount], w[kCount], g[kCount], value[kCount];
#pragma unroll
    for (int j = 0; j < Loss::kInputs; ++j) read<T, kCount>(a, a.inputs[j], i, v[j]);
    if (a.weight.p) read<T, kCount>(a, a.weight, i, w);
    const bool each_upstream = a.upstream.p && a.upstream.period != 1;
    if (each_upstream) read<T, kCount>(a, a.upstream, i, g);
    const bool product_of_logs = Loss::kLogSum && a.partial && !a.weight.p;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      R in[Loss::kInputs], d[Loss::kInputs], t[kStepsOf<Loss> + 1], u = 0;
#pragma unroll
      for (int j = 0; j < Loss::kInputs; ++j) in[j] = v[j][e];
      take_steps(loss, in, t);
      value[e] = evaluate(loss, in, t, d, u);
      if constexpr (Loss::kLogSum) {
        if (product_of_logs) {
          product = product * u + (product + u);
        } else {
          value[e] += log1p_unit(u);
        }
      }
      R factor = each_upstream ? k * g[e] : k;
      bool counts = true;
      if (a.weight.p) {
        counts = w[e] != 0;
        value[e] = counts ? w[e] * value[e] : R(0);
        factor *= w[e];
      }
      sum += value[e];
#pragma unroll
      for (int j = 0; j < Loss::kInputs; ++j)
        if (Loss::kWrt >> j & 1) v[j][e] = counts ? gradient_of<Loss>(d[j], factor) : R(0);
    }
    if (a.out) {
      if (!a.out_acc) {
        write<T, kCount>(a.out, i, value);
      } else {
#pragma unroll
        for (int e = 0; e < kCount; ++e) static_cast<R*>(a.out)[i + e] = value[e];
      }
    }
#pragma unroll
    for (int j = 0; j < Loss::kInputs; ++j)
      if ((Loss::kWrt >> j & 1) && a.dx[j]) write<T, kCount>(a.dx[j], i, v[j]);
  }

  __device__ __forceinline__ bool all_aligned() const {
    bool yes = aligned(a.out) || a.out_acc;
#pragma unroll
    for (int j = 0; j < Loss::kInputs; ++j) {
      yes = yes && (!flat(a, a.inputs[j]) || aligned(a.inputs[j].p));
      if (Loss::kWrt >> j & 1) yes = yes && aligned(a.dx[j]);
    }
    yes = yes && (!flat(a, a.weight) || aligned(a.weight.p));
    return yes && (!flat(a, a.upstream) || aligned(a.upstream.p));
  }
  __device__ __forceinline__ void run() {
    const int64_t begin = blockIdx.x * kTile<T> + int64_t{threadIdx.x} * N;
    const bool together = all_aligned();
#pragma unroll 1
    for (int u = 0; u < kTileVectors; ++u) {
      const int64_t i = begin + int64_t{u} * kElementThreads * N;
      if (together && i + N <= a.n) {
        step<N>(i);
      } else {
#pragma unroll 1
        for (int64_t e = i; e < i + N && e < a.n; ++e) step<1>(e);
      }
    }
  }
};

// Minimum of resident blocks, for __launch_bounds__. Losses of many inputs, or of float64 ones, and losses of
// logits in float32 need more registers than the compiler would give them.
template <class Loss, class T>
constexpr int few_blocks() {
  if (Loss::kInputs > 2 || sizeof(T) == 8) return 2;
  return kStepsOf<Loss> != 0 && sizeof(T) == 4 ? 3 : 0;
}
template <class Loss, class T>
constexpr int kFewBlocks = few_blocks<Loss, T>();

template <class Loss, class T>
__global__ void __launch_bounds__(kElementThreads, kFewBlocks<Loss, T>) elements_kernel(ElementArgs a) {
  using R = acc_t<T>;
  R k = R(a.scale);
  if (a.norm) k /= *static_cast<const R*>(a.norm);
  if (a.upstream.p && a.upstream.period == 1) {
    const R g = element<T>(a, a.upstream, 0);
    if (a.skip_unit_upstream && g == 1) return;
    k *= g;
  }
  ElementThread<Loss, T> thread{a, Loss(a.hparams), k, 0, 0};
  thread.run();
  if (!a.partial) return;
  if constexpr (Loss::kLogSum) thread.sum += log1p(thread.product);
  const double sum = block_sum<kElementThreads>(double(thread.sum));
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    write_result<T>(a, sum);
  } else {
    a.partial[blockIdx.x] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(ElementArgs a, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += a.partial[i];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) write_result<T>(a, sum);
}

template <class T>
int64_t tiles(int64_t n) {
  return (n + kTile<T> - 1) / kTile<T>;
}

// A loss of which only the first input's gradient is requested: the others are not computed.
template <class Loss>
struct FirstAlone : Loss {
  static constexpr unsigned kWrt = Loss::kWrt & -Loss::kWrt;
  using Loss::Loss;
};
template <class Loss>
bool first_alone(const ElementArgs& a) {
  for (int j = 0; j < Loss::kInputs; ++j)
    if (a.dx[j] && (Loss::kWrt & ~FirstAlone<Loss>::kWrt) >> j & 1) return false;
  return true;
}

template <class Loss, class T>
void launch_elements(const ElementArgs& a, cudaStream_t stream) {
  // worth separate kernels where a gradient is expensive: losses of logits
  if constexpr (kStepsOf<Loss> > 0 && FirstAlone<Loss>::kWrt != Loss::kWrt)
    if (first_alone<Loss>(a)) return launch_elements<FirstAlone<Loss>, T>(a, stream);
  const int64_t blocks = tiles<T>(a.n);
  launch_1d<&elements_kernel<Loss, T>>(blocks, kElementThreads, 0, stream, a);
  if (a.partial && blocks != 1) launch_1d<&sum_kernel<T>>(1, kSumThreads, 0, stream, a, blocks);
}

}  // namespace fastloss::cuda
