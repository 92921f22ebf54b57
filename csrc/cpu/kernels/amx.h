// Matrix multiplication in the tile registers of AMX, for what lies in the caches. See gemm.h for the same
// with vector registers.
//
//   c[m, n] (+)= left[m, depth] right[depth, n]
//
// AMX multiplies bfloat16 and adds in float32. A number of another type is split into a sum of kTerms
// bfloat16 terms: one for bfloat16, two for float16, three for float32, which together hold its 24 bits.
// Products of terms that are smaller than the type's rounding are left out: 1, 3 and 6 products remain.
//
// Packed operands are tiles of 16 x 32 numbers, 1 KB each: [panels of 32 items][steps of 32 along depth]
// [terms][2 tiles]. In a tile of the left operand each row is an item; in one of the right operand columns
// are items and rows are pairs along depth. Every element of c is summed along depth in the same order
// wherever it stands, and then added: its bits depend neither on its panel nor on its neighbours.
#pragma once
#include <immintrin.h>

#include "../../math/math.h"

namespace fastloss::inline FL_ISA {

// Configures the tile registers, eight of 16 rows x 64 bytes, for its lifetime.
class TileScope {
  alignas(64) uint8_t before_[64];

 public:
  TileScope() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    _tile_storeconfig(before_);
    _tile_loadconfig(config);
  }
  ~TileScope() { before_[0] ? _tile_loadconfig(before_) : _tile_release(); }
  TileScope(const TileScope&) = delete;
};

template <int kTerms>
struct TileProducts {
  using Scope = TileScope;
  static constexpr int kSide = 32, kStep = 32, kTile = 1024;
  static constexpr int64_t kStepBytes = 2 * kTerms * kTile;  // of a panel
  static constexpr int64_t kRows = 576 / kTerms;  // packed, they fit in the L2 cache with room to spare

  template <bool kIsLeft>
  static constexpr int64_t packed_bytes(int64_t count, int64_t depth) {
    return (count + kSide - 1) / kSide * ((depth + kStep - 1) / kStep) * kStepBytes;
  }

  // `count` items of `depth` numbers: number k of item i is at x[i * stride + k * element].
  template <bool kIsLeft, class S>
  FL_NOINLINE static void pack(const S* x, int64_t stride, int64_t element, int64_t count, int64_t depth,
                               char* out) {
    for (int64_t p = 0; p < count; p += kSide)
      for (int64_t k = 0; k < depth; k += kStep, out += kStepBytes)
        for (int half = 0; half < 2; ++half) {
          const int64_t item = p + 16 * half, left = count - item;
          const int items = left > 16 ? 16 : left > 0 ? int(left) : 0;
          const int steps = depth - k < kStep ? int(depth - k) : kStep;
          const S* from = x + (items ? item : 0) * stride + k * element;
          char* tile = out + half * kTile;
          if (items < 16 || steps < kStep || (element != 1 && stride != 1)) {
            alignas(64) S padded[16 * kStep] = {};
            for (int i = 0; i < items; ++i)
              for (int s = 0; s < steps; ++s) padded[i * kStep + s] = from[i * stride + s * element];
            from_items<kIsLeft>(padded, kStep, tile);
          } else if (element == 1) {
            from_items<kIsLeft>(from, stride, tile);
          } else {
            from_steps<kIsLeft>(from, element, tile);
          }
        }
  }

  // c[m, n] = left right, added to c if `add`. Nothing outside [m, n] is written.
  FL_NOINLINE static void multiply(const char* left, const char* right, int64_t m, int64_t n, int64_t depth,
                                   float* c, int64_t ldc, bool add) {
    const int64_t steps = (depth + kStep - 1) / kStep, panel = steps * kStepBytes;
    alignas(64) float sum[kSide * kSide];
    for (int64_t j = 0; j < n; j += kSide, right += panel) {
      const char* l = left;
      for (int64_t i = 0; i < m; i += kSide, l += panel) {
        float* to = c + i * ldc + j;
        const int rows = m - i < kSide ? int(m - i) : kSide, columns = n - j < kSide ? int(n - j) : kSide;
        const bool last = i + kSide >= m;
        if (last && j + kSide >= n) {
          multiply_panels(l, right, steps, sum, to, 0);
        } else {
          multiply_panels(l, right, steps, sum, last ? c + j + kSide : to + kSide * ldc, ldc);
        }
        if (columns == kSide) {
          for (int r = 0; r < rows; ++r, to += ldc)
            for (int v = 0; v < kSide; v += 16) {
              const f32v s = load(sum + r * kSide + v);
              store(to + v, add ? load(to + v) + s : s);
            }
        } else {
          for (int r = 0; r < rows; ++r, to += ldc)
            for (int v = 0; v < columns; ++v) to[v] = add ? to[v] + sum[r * kSide + v] : sum[r * kSide + v];
        }
      }
    }
  }

 private:
  // Transposes 16 vectors of 16 pairs.
  FL_FN static void turn(__m512i* r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
      r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
      r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
      r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
  }
  FL_FN static f32v widened(__m256i h) { return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
  // The next term of x; the remainder stays in x.
  FL_FN static __m256i split(f32v& x) {
    const __m256i h = (__m256i)_mm512_cvtneps_pbh(x);
    x -= widened(h);
    return h;
  }
  FL_FN static void write(__m512i (*terms)[16], bool turned, char* tile) {
    for (int p = 0; p < kTerms; ++p) {
      if (turned) turn(terms[p]);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 2 * p * kTile + 64 * i, terms[p][i]);
    }
  }

  template <bool kIsLeft, class S>
  FL_FN static void from_items(const S* x, int64_t stride, char* tile) {
    __m512i terms[kTerms][16];
    for (int i = 0; i < 16; ++i, x += stride) {
      if constexpr (sizeof(S) == 2 && kTerms == 1) {
        terms[0][i] = _mm512_loadu_si512(x);
      } else {
        f32v low = load(x), high = load(x + 16);
        for (int p = 0; p < kTerms; ++p) {
          const __m256i l = split(low), h = split(high);
          terms[p][i] = _mm512_inserti64x4(_mm512_castsi256_si512(l), h, 1);
        }
      }
    }
    write(terms, !kIsLeft, tile);
  }
  template <bool kIsLeft, class S>
  FL_FN static void from_steps(const S* x, int64_t element, char* tile) {
    __m512i terms[kTerms][16];
    for (int i = 0; i < 16; ++i, x += 2 * element) {
      if constexpr (sizeof(S) == 2 && kTerms == 1) {
        const __m512i e = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))),
                      o = _mm512_cvtepu16_epi32(
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + element)));
        terms[0][i] = _mm512_or_si512(e, _mm512_slli_epi32(o, 16));
        continue;
      }
      f32v even = load(x), odd = load(x + element);
      for (int p = 0; p < kTerms; ++p) {
        const __m512i e = _mm512_cvtepu16_epi32(split(even)), o = _mm512_cvtepu16_epi32(split(odd));
        terms[p][i] = _mm512_or_si512(e, _mm512_slli_epi32(o, 16));
      }
    }
    write(terms, kIsLeft, tile);
  }

  // Tile registers: 0 to 3 sum, 4 and 5 hold the left operand, 6 and 7 the right one.
#define FASTLOSS_LOAD_LEFT(term)                 \
  _tile_loadd(4, left + 2 * (term) * kTile, 64); \
  _tile_loadd(5, left + 2 * (term) * kTile + kTile, 64)
#define FASTLOSS_LOAD_RIGHT(term)                 \
  _tile_loadd(6, right + 2 * (term) * kTile, 64); \
  _tile_loadd(7, right + 2 * (term) * kTile + kTile, 64)
#define FASTLOSS_MULTIPLY  \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
  // sum = left right, for one panel of each. Prefetches the 32 rows of c from `next` on, which are added to
  // next.
  FL_FN static void multiply_panels(const char* left, const char* right, int64_t steps, float* sum,
                                    const float* next, int64_t ldc) {
    const int64_t at_once = kSide / steps + 1;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < steps; ++k, left += kStepBytes, right += kStepBytes) {
      for (int64_t r = 0; r < at_once; ++r, next += ldc) {
        __builtin_prefetch(next, 1);
        __builtin_prefetch(next + 16, 1);
      }
      FASTLOSS_LOAD_LEFT(0);
      FASTLOSS_LOAD_RIGHT(0);
      FASTLOSS_MULTIPLY;
      if constexpr (kTerms == 2) {
        FASTLOSS_LOAD_LEFT(1);
        FASTLOSS_MULTIPLY;
        FASTLOSS_LOAD_LEFT(0);
        FASTLOSS_LOAD_RIGHT(1);
        FASTLOSS_MULTIPLY;
      }
      if constexpr (kTerms == 3) {
        FASTLOSS_LOAD_LEFT(1);
        FASTLOSS_MULTIPLY;
        FASTLOSS_LOAD_LEFT(2);
        FASTLOSS_MULTIPLY;
        FASTLOSS_LOAD_LEFT(0);
        FASTLOSS_LOAD_RIGHT(1);
        FASTLOSS_MULTIPLY;
        FASTLOSS_LOAD_LEFT(1);
        FASTLOSS_MULTIPLY;
        FASTLOSS_LOAD_LEFT(0);
        FASTLOSS_LOAD_RIGHT(2);
        FASTLOSS_MULTIPLY;
      }
    }
    _tile_stored(0, sum, 4 * kSide);
    _tile_stored(1, sum + 16, 4 * kSide);
    _tile_stored(2, sum + 16 * kSide, 4 * kSide);
    _tile_stored(3, sum + 16 * kSide + 16, 4 * kSide);
  }
#undef FASTLOSS_LOAD_LEFT
#undef FASTLOSS_LOAD_RIGHT
#undef FASTLOSS_MULTIPLY
};

}  // namespace fastloss::inline FL_ISA
