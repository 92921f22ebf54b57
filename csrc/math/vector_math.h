// Logarithms and related functions for vectors, accurate to about one unit in the last
// place; infinities, zeros, negative numbers and NaN give what the C library gives.
#pragma once
#include "vector_memory.h"

namespace fastloss::inline FL_ISA {

FL_FN f32v abs(f32v x) { return (f32v)((u32v)x & 0x7fffffffu); }
FL_FN f64v abs(f64v x) { return (f64v)((i64v)x & 0x7fffffffffffffff); }
FL_FN f32v copysign(f32v size, f32v sign) {
  return (f32v)(((u32v)size & 0x7fffffffu) | ((u32v)sign & 0x80000000u));
}
FL_FN f64v copysign(f64v size, f64v sign) {
  constexpr int64_t kSize = 0x7fffffffffffffff;
  return (f64v)(((i64v)size & kSize) | ((i64v)sign & ~kSize));
}
FL_FN f32v min(f32v a, f32v b) { return a < b ? a : b; }
FL_FN f64v min(f64v a, f64v b) { return a < b ? a : b; }
FL_FN f32v sqrt(f32v x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  return _mm_sqrt_ps(x);
#endif
}
FL_FN f64v sqrt(f64v x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_pd(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#else
  return _mm_sqrt_pd(x);
#endif
}

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]: f - f^2 / 2 + f^3 P(f) in float; in double
// f - f^2 / 2 + s (f^2 / 2 + R(s^2)) with s = f / (2 + f), the even part of 2 atanh(s).
FL_FN f32v log1p_near(f32v f) {
  const f32v p =
      polynomial(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  return fma(f * f, fma(f, p, fill<f32v>(-0.5f)), f);
}
FL_FN f64v log1p_near(f64v f) {
  const f64v s = f / (2 + f), z = s * s, half = 0.5 * f * f;
  const f64v r = z * polynomial(z, 1.479819860511658591e-1, 1.531383769920937332e-1, 1.818357216161805012e-1,
                                2.222219843214978396e-1, 2.857142874366239149e-1, 3.999999999940941908e-1,
                                6.666666666666735130e-1);
  return f - (half - s * (half + r));
}

// The reduction x = 2^k (1 + f) for positive normal x, and log 2 in two parts, of which k times the first is
// exact.
template <class F>
struct Logarithm;
template <>
struct Logarithm<f32v> {
  static constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f, kTiny = 0x1p-126f, kScale = 0x1p24f;
  static constexpr int kScaleBits = 24;
  FL_FN static f32v split(f32v x, f32v& k) {
    constexpr uint32_t kRoot = 0x3f3504f3;  // sqrt(1/2)
    const u32v b = (u32v)x + (0x3f800000 - kRoot);
    k = __builtin_convertvector((i32v)(b >> 23) - 127, f32v);
    return (f32v)((b & 0x7fffff) + kRoot) - 1;
  }
};
template <>
struct Logarithm<f64v> {
  static constexpr double kHigh = 6.93147180369123816490e-1, kLow = 1.90821492927058770002e-10,
                          kTiny = 0x1p-1022, kScale = 0x1p54;
  static constexpr int kScaleBits = 54;
  FL_FN static f64v split(f64v x, f64v& k) {
    constexpr int64_t kRoot = 0x3fe6a09e667f3bcd;
    const i64v b = (i64v)x + (0x3ff0000000000000 - kRoot);
    // the biased exponent in the low bits of 2^52, so that no conversion from 64-bit integers is needed
    k = (f64v)((b >> 52) | 0x4330000000000000) - (0x1p52 + 1023);
    return (f64v)((b & 0xfffffffffffff) + kRoot) - 1;
  }
};

template <class F>
FL_FN F log(F x) {
  using L = Logarithm<F>;
  const auto tiny = x < L::kTiny;
  F k;
  const F f = L::split(select(tiny, x * L::kScale, x), k);
  k = select(tiny, k - L::kScaleBits, k);
  const F r = fma(k, fill<F>(L::kHigh), fma(k, fill<F>(L::kLow), log1p_near(f)));
  const F special = select(x == 0, fill<F>(-INFINITY), select(x > 0, x, fill<F>(NAN)));
  return select((x > 0) & (x < INFINITY), r, special);
}

// log(1 + u): the logarithm of the rounded sum, plus a correction for its rounding error.
template <class F>
FL_FN F log1p(F u) {
  using L = Logarithm<F>;
  const F y = 1 + u;
  F k;
  const F f = L::split(y, k), lost = select(k > 1, 1 - (y - u), u - (y - 1)) / y;
  const F r = fma(k, fill<F>(L::kHigh), log1p_near(f) + fma(k, fill<F>(L::kLow), lost));
  const F special = select(u == -1, fill<F>(-INFINITY), select(u > -1, u, fill<F>(NAN)));
  return select((u > -1) & (u < INFINITY), r, special);
}
template <class F>
  requires(kLanes<F> > 1)
FL_FN F log1p_unit(F u) {
  const auto is_large = u > scalar_t<F>(0.41421356);
  const F below = log1p_near(select(is_large, scalar_t<F>(0.5) * (u - 1), u));
  return select(is_large, below + scalar_t<F>(0.6931471805599453), below);
}

// 2^n (e^r - 1) + (2^n - 1), computed with 2^(n - 1): 2^n may overflow before the result does.
FL_FN f32v expm1(f32v x) {
  const f32v bounded = x < -30.f ? fill<f32v>(-30.f) : (x > 89.f ? fill<f32v>(89.f) : x);
  const f32v n = (bounded * kLog2e<float> + kToInteger) - kToInteger;
  const f32v r = fma(n, fill<f32v>(-kLn2Low), fma(n, fill<f32v>(-kLn2High), bounded));
  const f32v p =
      fma(r * r,
          polynomial(r, 1.38145394e-3f, 8.36874545e-3f, 4.16683890e-2f, 1.66665211e-1f, 4.99999940e-1f), r);
  const f32v half = (f32v)((__builtin_convertvector(n, i32v) + 126) << 23);
  const f32v result = 2 * fma(half, p, half - 0.5f);
  return x != x ? x : (n == 0 ? p : result);
}
FL_FN f64v expm1(f64v x) {
  f64v r;  // float64 is for accuracy, not speed
  for (int i = 0; i < kLanes<f64v>; ++i) r[i] = ::expm1(x[i]);
  return r;
}

}  // namespace fastloss::inline FL_ISA
