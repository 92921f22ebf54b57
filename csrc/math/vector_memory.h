// Loads and stores of vectors, with conversion: of whole vectors, of their first lanes, and streaming stores.
#pragma once
#include "simd.h"

namespace fastloss::inline FL_ISA {

// ---- loads: kLanes elements of T as a vector of its accumulation type
FL_FN f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FL_FN f64v load(const double* p) {
  f64v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FL_FN f32v load(const BFloat16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // the compiler would widen each half on its own
  return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                                 16);
#else
  u16v v;
  std::memcpy(&v, p, sizeof v);
  return (f32v)(__builtin_convertvector(v, u32v) << 16);
#endif
}
FL_FN float widen(Half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity, NaN
    const uint32_t b = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    float f;
    std::memcpy(&f, &b, 4);
    return f;
  }
  const uint32_t b = magnitude << 13;
  float f;
  std::memcpy(&f, &b, 4);
  f *= 0x1p112f;  // exact, subnormals included
  return sign ? -f : f;
}
FL_FN f32v load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  f32v v;
  for (int k = 0; k < kLanes<f32v>; ++k) v[k] = widen(p[k]);
  return v;
#endif
}
FL_FN float widen(float x) { return x; }
FL_FN double widen(double x) { return x; }
FL_FN float widen(BFloat16 h) {
  const uint32_t b = uint32_t(h.bits) << 16;
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

// The first `count` (< kLanes) elements; `pad` in the other lanes. Memory after them is not touched.
template <class T>
FL_FN vector_t<acc_t<T>> load_part(const T* p, int64_t count, acc_t<T> pad) {
  using F = vector_t<acc_t<T>>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_loadu_ps(fill<F>(pad), (1u << count) - 1, p);
  else if constexpr (std::is_same_v<T, double>)
    return _mm512_mask_loadu_pd(fill<F>(pad), (1u << count) - 1, p);
  T buffer[kLanes<F>];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16((1u << count) - 1, p));
#else
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return select(first_lanes<F>(count), f32v(_mm256_maskload_ps(p, (__m256i)first_lanes<F>(count))),
                  fill<F>(pad));
  else if constexpr (std::is_same_v<T, double>)
    return select(first_lanes<F>(count), f64v(_mm256_maskload_pd(p, (__m256i)first_lanes<F>(count))),
                  fill<F>(pad));
#endif
  T buffer[kLanes<F>] = {};
  std::memcpy(buffer, p, count * sizeof(T));
#endif
  return select(first_lanes<F>(count), load(buffer), fill<F>(pad));
}

// ---- stores: round to nearest even
FL_FN void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }
FL_FN void store(double* p, f64v v) { std::memcpy(p, &v, sizeof v); }
#if defined(__AVX512F__)
// By the conversion instruction, which takes subnormal numbers for 0.
inline const bool kConvertsBf16 = __builtin_cpu_supports("avx512bf16");
#endif
FL_FN u16v narrow_bf16(f32v v) {
#if defined(__AVX512F__)
  if (kConvertsBf16) [[likely]] {
    u16v h;  // inline assembly: an intrinsic would need its target option in every caller
    asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
    return h;
  }
#endif
  const u32v b = (u32v)v;
  const u32v rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const u32v bits = v != v ? u32v{} + 0x7fc0 : rounded;
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (u16v)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)bits),
                                _mm256_extracti128_si256((__m256i)bits, 1));
#else
  return __builtin_convertvector(bits, u16v);
#endif
}
FL_FN void store(BFloat16* p, f32v v) {
  const u16v h = narrow_bf16(v);
  std::memcpy(p, &h, sizeof h);
}
FL_FN Half narrow_half(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  const uint16_t sign = b >> 16 & 0x8000;
  b &= 0x7fffffff;
  if (b > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (b >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
  float f;
  std::memcpy(&f, &b, 4);
  if (b < 0x38800000) {  // below 2^-14: adding 0.5 rounds at the last bit of a subnormal half
    f += 0.5f;
    std::memcpy(&b, &f, 4);
    return {uint16_t(sign | (b - 0x3f000000))};
  }
  b += 0xfff + (b >> 13 & 1) - 0x38000000;
  return {uint16_t(sign | b >> 13)};
}
FL_FN void store(Half* p, f32v v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int k = 0; k < kLanes<f32v>; ++k) p[k] = narrow_half(v[k]);
#endif
}
template <class T>
FL_FN void store_part(T* p, vector_t<acc_t<T>> v, int64_t count) {
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, lanes, v);
  if constexpr (std::is_same_v<T, double>) return _mm512_mask_storeu_pd(p, lanes, v);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return _mm256_maskstore_ps(p, (__m256i)first_lanes<f32v>(count), v);
  if constexpr (std::is_same_v<T, double>)
    return _mm256_maskstore_pd(p, (__m256i)first_lanes<f64v>(count), v);
#endif
  T buffer[kLanes<vector_t<acc_t<T>>>];
  store(buffer, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    return _mm256_mask_storeu_epi16(p, lanes, _mm256_loadu_si256(reinterpret_cast<__m256i*>(buffer)));
#endif
  std::memcpy(p, buffer, count * sizeof(T));
}
template <class T>
FL_FN void store_one(T* p, acc_t<T> x) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    *p = x;
  } else {
    store_part(p, fill<vector_t<acc_t<T>>>(x), 1);
  }
}

// Streaming store of one vector; p is aligned to its size. The caller ends with _mm_sfence.
template <class T>
FL_FN void stream(T* p, vector_t<acc_t<T>> v) {
  constexpr int kBytes = sizeof(T) * kLanes<vector_t<acc_t<T>>>;
  alignas(64) T line[kLanes<vector_t<acc_t<T>>>];
  store(line, v);
#if defined(__AVX512F__)
  if constexpr (kBytes == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_load_si512(line));
#endif
#if defined(__AVX2__)
  if constexpr (kBytes == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                               _mm256_load_si256(reinterpret_cast<const __m256i*>(line)));
#endif
  if constexpr (kBytes == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<const __m128i*>(line)));
  } else if constexpr (kBytes == 8) {
    long long bits;
    std::memcpy(&bits, line, 8);
    _mm_stream_si64(reinterpret_cast<long long*>(p), bits);
  }
}

}  // namespace fastloss::inline FL_ISA
