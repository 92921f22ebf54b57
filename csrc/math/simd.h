// SIMD vectors of float or double, one register of the instruction set being compiled for, and their
// functions: exp, tanh, max, sums. They are GCC vector types; intrinsics are used only where there is no
// operator. Loads and stores are in vector_memory.h.
#pragma once
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "dtype.h"
#include "scalar_math.h"

namespace fastloss::inline FL_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

using f32v = float __attribute__((vector_size(kVectorBytes)));
using f64v = double __attribute__((vector_size(kVectorBytes)));
using i32v = int32_t __attribute__((vector_size(kVectorBytes)));
using u32v = uint32_t __attribute__((vector_size(kVectorBytes)));
using i64v = int64_t __attribute__((vector_size(kVectorBytes)));
using u16v = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

template <>
struct Lanes<f32v> {
  using scalar = float;
  static FL_FN f32v fill(float x) { return f32v{} + x; }
};
template <>
struct Lanes<f64v> {
  using scalar = double;
  static FL_FN f64v fill(double x) { return f64v{} + x; }
};
template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = f32v;
};
template <>
struct VectorOf<double> {
  using type = f64v;
};
template <class R>
using vector_t = typename VectorOf<R>::type;
template <class F>
inline constexpr int kLanes = sizeof(F) / sizeof(scalar_t<F>);

// A NaN in `a` is dropped: pass the new element first and the running maximum second.
FL_FN f32v max(f32v a, f32v b) { return a > b ? a : b; }
FL_FN f64v max(f64v a, f64v b) { return a > b ? a : b; }
FL_FN f32v select(i32v c, f32v a, f32v b) { return c ? a : b; }
FL_FN f64v select(i64v c, f64v a, f64v b) { return c ? a : b; }

// Lane numbers 0, 1, ..., and the mask of the first `count` lanes.
template <class F>
FL_FN auto lane_numbers() {
  using I = std::conditional_t<sizeof(scalar_t<F>) == 4, i32v, i64v>;
  I v;
  for (int k = 0; k < kLanes<F>; ++k) v[k] = k;
  return v;
}
template <class F>
FL_FN auto first_lanes(int64_t count) {
  using Lane = std::conditional_t<sizeof(scalar_t<F>) == 4, int32_t, int64_t>;
  return lane_numbers<F>() < static_cast<Lane>(count);
}

template <class F>
FL_FN scalar_t<F> horizontal_max(F v) {
  scalar_t<F> m = v[0];
  for (int k = 1; k < kLanes<F>; ++k) m = v[k] > m ? v[k] : m;
  return m;
}
// The largest of count > 0 half-precision numbers, compared by their bits: as integers these are in order
// once those of negative numbers are inverted. A NaN is larger than all, or smaller if its sign is negative.
template <class I>
FL_FN I in_order(I bits) {
  return bits ^ ((bits >> 15) & 0x7fff);
}
template <class T>
  requires(sizeof(T) == 2)
FL_FN T max_half(const T* x, int64_t count) {
  using i16v = int16_t __attribute__((vector_size(kVectorBytes)));
  constexpr int kWide = kVectorBytes / 2, kUnroll = 4;
  i16v top[kUnroll], v;
  for (i16v& t : top) t = i16v{} + int16_t(INT16_MIN);
  int64_t j = 0;
  for (; j + kUnroll * kWide <= count; j += kUnroll * kWide)
    for (int u = 0; u < kUnroll; ++u) {
      std::memcpy(&v, x + j + u * kWide, sizeof v);
      v = in_order(v);
      top[u] = v > top[u] ? v : top[u];
    }
  int m = INT16_MIN;
  for (const i16v& t : top)
    for (int k = 0; k < kWide; ++k) m = t[k] > m ? t[k] : m;
  for (; j < count; ++j) {
    const int one = in_order(static_cast<int>(static_cast<int16_t>(x[j].bits)));
    m = one > m ? one : m;
  }
  return T{static_cast<uint16_t>(in_order(m))};
}

template <class F>
FL_FN scalar_t<F> horizontal_sum(F v) {
  scalar_t<F> part[kLanes<F>];
  std::memcpy(part, &v, sizeof v);
  for (int width = kLanes<F> / 2; width; width /= 2)  // pairwise, in a fixed order
    for (int k = 0; k < width; ++k) part[k] += part[k + width];
  return part[0];
}

// a * b + c, rounded once if the machine has FMA: explicit, so that it does not depend on which expressions
// the compiler contracts.
FL_FN f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
FL_FN f64v fma(f64v a, f64v b, f64v c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}
FL_FN f32v rounded(f32v x) {  // see scalar_math.h
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#else
  asm("" : "+x"(x));
#endif
  return x;
}
FL_FN f64v rounded(f64v x) { return (f64v)rounded((f32v)x); }
// The polynomial with these coefficients, highest power first.
template <class F, class... C>
FL_FN F polynomial(F x, scalar_t<F> highest, C... rest) {
  F p = fill<F>(highest);
  ((p = fma(p, x, fill<F>(rest))), ...);
  return p;
}

// The same for N vectors, in place.
template <int N, class... C>
FL_FN void polynomial(f32v (&x)[N], float highest, C... rest) {
  f32v p[N];
  for (f32v& v : p) v = fill<f32v>(highest);
  auto step = [&](float c) __attribute__((always_inline)) {
    for (int u = 0; u < N; ++u) p[u] = fma(p[u], x[u], fill<f32v>(c));
  };
  (step(rest), ...);
  for (int u = 0; u < N; ++u) x[u] = p[u];
}

// min and max that pass NaN on.
FL_FN f32v at_most(float bound, f32v x) {
#if defined(__AVX512F__)
  return _mm512_min_ps(fill<f32v>(bound), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(fill<f32v>(bound), x);
#else
  return _mm_min_ps(fill<f32v>(bound), x);
#endif
}
FL_FN f32v at_least(float bound, f32v x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(fill<f32v>(bound), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(fill<f32v>(bound), x);
#else
  return _mm_max_ps(fill<f32v>(bound), x);
#endif
}

// exp(r), |r| <= log(2) / 2, of one vector, or of several in place; minimax, 3e-9.
template <class V>
FL_FN auto exp_reduced(V&& r) {
  return polynomial(r, 1.38145394e-3f, 8.36874545e-3f, 4.16683890e-2f, 1.66665211e-1f, 4.99999940e-1f, 1.f,
                    1.f);
}
inline constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
// Added to a float of moderate size, it leaves the nearest integer in the low bits.
inline constexpr float kToInteger = 12582912.f;
// The same, and the low bits are those of 2^(n + 64). Below kLowest exp is 0.
inline constexpr float kShift = kToInteger + 127 + 64, kLowest = -104.f;

// exp(x): Cody-Waite reduction and a polynomial. Error < 1 ulp in float for x in [-87.3, 88.7], zero below,
// infinity above, NaN kept.
FL_FN f32v exp(f32v x) {
  const f32v bounded = at_least(kLowest, at_most(89.f, x));
#if defined(__AVX512F__)
  const f32v n = _mm512_roundscale_ps(bounded * kLog2e<float>, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const f32v n = fma(bounded, fill<f32v>(kLog2e<float>), fill<f32v>(kToInteger)) - kToInteger;
#endif
  const f32v p = exp_reduced(fma(n, fill<f32v>(-kLn2Low), fma(n, fill<f32v>(-kLn2High), bounded)));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const i32v power = __builtin_convertvector(n, i32v);
  const i32v half = power >> 1;  // two factors: 2^n alone leaves the range of normal floats at both ends
  return p * (f32v)((half + 127) << 23) * (f32v)((power - half + 127) << 23);
#endif
}
FL_FN f64v exp(f64v x) {
  constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.4286068203094172e-6;
  constexpr double kToInteger = 6755399441055744.;
  const f64v bounded = x < -746. ? fill<f64v>(-746.) : (x > 710. ? fill<f64v>(710.) : x);
  const f64v n = (bounded * kLog2e<double> + kToInteger) - kToInteger;
  const f64v r = fma(n, fill<f64v>(-kLn2Low), fma(n, fill<f64v>(-kLn2High), bounded));
  f64v p = fill<f64v>(1. / 6227020800.);  // Taylor to r^13: |r| <= 0.347, remainder 4e-18
  constexpr double kInverseFactorial[] = {
      1. / 479001600., 1. / 39916800., 1. / 3628800., 1. / 362880., 1. / 40320., 1. / 5040.,
      1. / 720.,       1. / 120.,      1. / 24.,      1. / 6.,      0.5};
  for (double c : kInverseFactorial) p = fma(p, r, fill<f64v>(c));
  p = fma(p, r * r, r) + 1.;
  const f64v half = (0.5 * n + kToInteger) - kToInteger;
  return p * (f64v)((i64v)(half + (kToInteger + 1023)) << 52) *
         (f64v)((i64v)((n - half) + (kToInteger + 1023)) << 52);
}

// The same bits for x <= 0: 2^n is kept as 2^(n + 64) until the end, so that one factor is enough. For N
// vectors, interleaved: their dependency chains are independent, and out-of-order execution looks ahead over
// few instructions.
template <int N>
FL_FN void exp_down(const f64v (&x)[N], f64v (&e)[N]) {
  for (int u = 0; u < N; ++u) e[u] = exp(x[u]);
}
template <int N>
FL_FN void exp_down(const f32v (&x)[N], f32v (&e)[N]) {
#if defined(__AVX512F__)
  for (int u = 0; u < N; ++u) e[u] = exp(x[u]);
#else
  f32v shifted[N], n[N], r[N];
  for (int u = 0; u < N; ++u) r[u] = at_least(kLowest, x[u]);
  for (int u = 0; u < N; ++u) shifted[u] = fma(r[u], fill<f32v>(kLog2e<float>), fill<f32v>(kShift));
  for (int u = 0; u < N; ++u) n[u] = shifted[u] - kShift;
  for (int u = 0; u < N; ++u) r[u] = fma(n[u], fill<f32v>(-kLn2High), r[u]);
  for (int u = 0; u < N; ++u) r[u] = fma(n[u], fill<f32v>(-kLn2Low), r[u]);
  exp_reduced(r);
  for (int u = 0; u < N; ++u) e[u] = r[u] * (f32v)((i32v)shifted[u] << 23) * 0x1p-64f;
#endif
}
template <class F>
FL_FN F exp_down(F x) {
  const F xs[1] = {x};
  F e[1];
  exp_down(xs, e);
  return e[0];
}
// The same for results that are rounded to half precision: 2^n p(t - n), t = x log2(e), from fewer
// instructions. Relative error 1.5e-7 + 1e-7 |x|; exp(0) is 1; NaN kept.
template <int N>
FL_FN void exp_for_half(const f32v (&x)[N], f32v (&e)[N]) {
#if defined(__AVX512DQ__)
  for (int u = 0; u < N; ++u) {
    const f32v t = _mm512_max_ps(fill<f32v>(-160.f), x[u] * kLog2e<float>);
    const f32v f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const f32v p =
        polynomial(f, 1.86711829e-3f, 9.01705492e-3f, 5.57998940e-2f, 2.40164459e-1f, 6.93151295e-1f, 1.f);
    e[u] = _mm512_scalef_ps(p, t);
  }
#else
  f32v shifted[N], f[N];
  for (int u = 0; u < N; ++u) f[u] = at_least(kLowest, x[u]);
  for (int u = 0; u < N; ++u) shifted[u] = fma(f[u], fill<f32v>(kLog2e<float>), fill<f32v>(kShift));
  for (int u = 0; u < N; ++u) f[u] = fma(f[u], fill<f32v>(kLog2e<float>), kShift - shifted[u]);
  polynomial(f, 1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.f);
  for (int u = 0; u < N; ++u) e[u] = f[u] * (f32v)((i32v)shifted[u] << 23) * 0x1p-64f;
#endif
}

// tanh(x): odd polynomial near zero (float), 1 - 2 / (exp(2|x|) + 1) elsewhere.
template <class F>
FL_FN F tanh(F x) {
  const F size = x < 0 ? -x : x;
  const F e = exp(size + size);
  F of_large = 1 - 2 / (e + 1);
  of_large = x < 0 ? -of_large : of_large;
  if constexpr (sizeof(scalar_t<F>) == 4) {
    const F s = x * x;
    F p = s * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    return size < 0.625f ? p * s * x + x : of_large;
  } else {
    F of_small;
    for (int k = 0; k < kLanes<F>; ++k) of_small[k] = std::tanh(x[k]);
    return size < 1 ? of_small : of_large;
  }
}

}  // namespace fastloss::inline FL_ISA
