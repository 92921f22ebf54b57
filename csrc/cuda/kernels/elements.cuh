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

__device__ __forceinline__ bool flat(const ElementArgs& a, const ElementInput& x) {
  return x.source == Source::element && x.inner == 1 && x.period >= a.n;
}
__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
// Whether N elements from a multiple of N on lie one after the other in the input, or are all the same one,
// or are classes of one row.
template <int N>
__device__ __forceinline__ bool in_vectors(const ElementArgs& a, const ElementInput& x) {
  if (flat(a, x)) return aligned(x.p);
  if (x.inner != 1) return x.inner % N == 0;
  return x.source != Source::one_hot && (x.period == 1 || x.period >= a.n || x.period % N == 0);
}

template <int kCount, class R, class Get>
__device__ __forceinline__ void fill_or_read(bool one, R* v, Get get) {
  if (kCount > 1 && one) {
    const R same = get(0);
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] = same;
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) v[k] = get(k);
}
// kCount elements from i on: one, or as many as in_vectors was asked for.
template <class T, int kCount>
__device__ __forceinline__ void read(const ElementArgs& a, const ElementInput& x, int64_t i, acc_t<T>* v) {
  using R = acc_t<T>;
  if (kCount > 1 && flat(a, x)) return widen_all(load16(static_cast<const T*>(x.p) + i), v);
  const int64_t row = x.inner == 1 ? i : x.period == 1 ? 0 : i / x.inner;  // divided only where it must be
  if (x.source == Source::one_hot) {
    const int64_t c = static_cast<const int64_t*>(x.p)[row], first = i - row * x.inner;
    // a class that does not exist gives NaN and is never used as an index
    const bool is_class = c != a.background_index,
               unknown = (c < 0 || c >= x.inner) && c != a.ignore_index && is_class;
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] = unknown ? R(NAN) : is_class && c == first + k ? R(1) : R(0);
    return;
  }
  const bool one = x.inner != 1 || x.period == 1;
  if (x.source == Source::not_ignored) {
    const int64_t* c = static_cast<const int64_t*>(x.p) + row;
    return fill_or_read<kCount>(one, v, [&](int k) { return c[k] == a.ignore_index ? R(0) : R(1); });
  }
  const int64_t at = row < x.period ? row : row % x.period;
  if (x.source == Source::flag) {
    const uint8_t* p = static_cast<const uint8_t*>(x.p) + at;
    return fill_or_read<kCount>(one, v, [&](int k) { return p[k] ? R(1) : R(0); });
  }
  if (x.source == Source::accumulation) {
    const R* p = static_cast<const R*>(x.p) + at;
    return fill_or_read<kCount>(one, v, [&](int k) { return p[k]; });
  }
  const T* p = static_cast<const T*>(x.p) + at;
  fill_or_read<kCount>(one, v, [&](int k) { return widen(p[k]); });
}
template <class T, int kCount>
__device__ __forceinline__ void write(void* p, int64_t i, const acc_t<T>* v) {
  T* to = static_cast<T*>(p) + i;
  if constexpr (kCount > 1) {
    store16(to, narrow_all<T>(v));
  } else {
    *to = narrow<T>(*v);
  }
}

template <class Loss, class T>
struct ElementThread {
  using R = acc_t<T>;
  static constexpr int N = Vec<T>::kSize, kInputs = Loss::kInputs;
  // Vectors of each input that are loaded before the first use.
  static constexpr int kInFlight = kInputs > 2 ? 1 : 2;
  const ElementArgs& a;
  const Loss loss;
  R k;             // factor of the gradients
  R sum, product;  // sum of log(1 + u) = log(1 + product)

  __device__ __forceinline__ bool each_upstream() const { return a.upstream.p && a.upstream.period != 1; }
  // The losses of kCount elements and their gradients, from the inputs v, which are overwritten. If there are
  // any, and not kPlain, with the weights w and the gradients g of the results.
  template <int kCount, bool kPlain>
  __device__ __forceinline__ void elements(int64_t i, R (&v)[kInputs][kCount], const R (&w)[kCount],
                                           const R (&g)[kCount]) {
    const bool weighted = !kPlain && a.weight.p, each = !kPlain && each_upstream();
    R value[kCount];
    const bool product_of_logs = Loss::kLogSum && a.partial && !weighted;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      R in[kInputs], d[kInputs], t[kStepsOf<Loss> + 1], u = 0;
#pragma unroll
      for (int j = 0; j < kInputs; ++j) in[j] = v[j][e];
      take_steps(loss, in, t);
      value[e] = evaluate(loss, in, t, d, u);
      if constexpr (Loss::kLogSum) {
        if (product_of_logs) {
          product = product * u + (product + u);
        } else {
          value[e] += log1p_unit(u);
        }
      }
      R factor = each ? k * g[e] : k;
      bool counts = true;
      if (weighted) {
        counts = w[e] != 0;
        value[e] = counts ? w[e] * value[e] : R(0);
        factor *= w[e];
      }
      sum += value[e];
#pragma unroll
      for (int j = 0; j < kInputs; ++j)
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
    for (int j = 0; j < kInputs; ++j)
      if ((Loss::kWrt >> j & 1) && a.dx[j]) write<T, kCount>(a.dx[j], i, v[j]);
  }
  template <int kCount>
  __device__ __forceinline__ void step(int64_t i) {
    R v[kInputs][kCount], w[kCount]{}, g[kCount]{};
#pragma unroll
    for (int j = 0; j < kInputs; ++j) read<T, kCount>(a, a.inputs[j], i, v[j]);
    if (a.weight.p) read<T, kCount>(a, a.weight, i, w);
    if (each_upstream()) read<T, kCount>(a, a.upstream, i, g);
    elements<kCount, false>(i, v, w, g);
  }

  // How much of the tile's work may be done 16 bytes at a time.
  enum class Width { one, vectors, plain };  // plain: and no input is broadcast or weighted
  __device__ __forceinline__ Width width() const {
    bool vectors = aligned(a.out) || a.out_acc, plain = !a.weight.p && !each_upstream();
#pragma unroll
    for (int j = 0; j < kInputs; ++j) {
      vectors = vectors && in_vectors<N>(a, a.inputs[j]);
      plain = plain && flat(a, a.inputs[j]);
      if (Loss::kWrt >> j & 1) vectors = vectors && aligned(a.dx[j]);
    }
    if (a.weight.p) vectors = vectors && in_vectors<N>(a, a.weight);
    if (each_upstream()) vectors = vectors && in_vectors<N>(a, a.upstream);
    return !vectors ? Width::one : plain ? Width::plain : Width::vectors;
  }
  // A whole tile without a branch between two loads.
  __device__ __forceinline__ void run_plain(int64_t begin) {
#pragma unroll 1
    for (int u = 0; u < kTileVectors; u += kInFlight) {
      Vec<T> raw[kInFlight][kInputs];
      const int64_t i = begin + int64_t{u} * kElementThreads * N;
#pragma unroll
      for (int f = 0; f < kInFlight; ++f)
#pragma unroll
        for (int j = 0; j < kInputs; ++j)
          raw[f][j] = load16(static_cast<const T*>(a.inputs[j].p) + i + f * kElementThreads * N);
#pragma unroll
      for (int f = 0; f < kInFlight; ++f) {
        R v[kInputs][N];
#pragma unroll
        for (int j = 0; j < kInputs; ++j) widen_all(raw[f][j], v[j]);
        elements<N, true>(i + f * kElementThreads * N, v, v[0], v[0]);
      }
    }
  }
  __device__ __forceinline__ void run(int64_t tile, Width wide) {
    const int64_t begin = tile * kTile<T> + int64_t{threadIdx.x} * N;
    if (wide == Width::plain && (tile + 1) * kTile<T> <= a.n) return run_plain(begin);
#pragma unroll 1
    for (int u = 0; u < kTileVectors; ++u) {
      const int64_t i = begin + int64_t{u} * kElementThreads * N;
      if (wide != Width::one && i + N <= a.n) {
        step<N>(i);
      } else {
#pragma unroll 1
        for (int64_t e = i; e < i + N && e < a.n; ++e) step<1>(e);
      }
    }
  }
};

// Minimum of resident blocks, for __launch_bounds__: more threads are not needed to keep memory busy, and
// some losses would not fit into fewer registers: those of three inputs, and those of logits with all gradients.
template <class Loss, class T>
constexpr int kFewBlocks = Loss::kInputs > 2 || sizeof(T) == 8 ||
                                   (kStepsOf<Loss> > 0 && (Loss::kWrt & (Loss::kWrt - 1)))
                               ? 2
                               : 3;

template <class Loss, class T>
__global__ void __launch_bounds__(kElementThreads, kFewBlocks<Loss, T>) elements_kernel(ElementArgs a) {
  using R = acc_t<T>;
  R k = R(a.scale);
  if (a.norm) k /= *static_cast<const R*>(a.norm);
  if (a.upstream.p && a.upstream.period == 1) {
    R g;
    read<T, 1>(a, a.upstream, 0, &g);
    if (a.skip_unit_upstream && g == 1) return;
    k *= g;
  }
  ElementThread<Loss, T> thread{a, Loss(a.hparams), k, 0, 0};
  const auto width = thread.width();
  // One tile, where there is a sum.
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile * kTile<T> < a.n; tile += gridDim.x) thread.run(tile, width);
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
  int64_t blocks = tiles<T>(a.n);
  if (a.skip_unit_upstream && !a.partial) blocks = blocks_to_skip(blocks, kElementThreads);
  launch_1d<&elements_kernel<Loss, T>>(blocks, kElementThreads, 0, stream, a);
  if (a.partial && blocks != 1) launch_1d<&sum_kernel<T>>(1, kSumThreads, 0, stream, a, blocks);
}

}  // namespace fastloss::cuda
