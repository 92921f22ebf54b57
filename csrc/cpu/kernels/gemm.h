// A GEMM on operands that fit in the caches: packed panels, and the micro-kernel, a register tile.
//
//   c[m, n] (+)= left[m, depth] right[depth, n]
//
// The left operand comes in panels of kLeft rows, the right one in panels of kRight columns: panel[k][width],
// so that each step k multiplies a column of kLeft numbers with kRight / lanes vectors. `pack` makes panels
// from any strides and converts half types; a panel of the left operand may also be rows of a matrix that
// lies transposed, read in place (`step` is its leading dimension). Every element is summed over k in order,
// in blocks of kDepth: its bits depend neither on its place in a panel nor on its neighbours.
//
// A right panel of one block stays in the L1 cache while all left panels pass; the caller picks m so that
// these stay in the L2 cache.
#pragma once
#include "../../math/math.h"

namespace fastloss::inline FL_ISA {

template <class R>
struct Gemm {
  using F = vector_t<R>;
#if defined(__AVX512F__)
  static constexpr int kLeft = 12, kVectors = 2;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
  static constexpr int kLeft = 4, kVectors = 3;  // 12 of 16, from 7 loads a step
#else
  static constexpr int kLeft = 4, kVectors = 2;
#endif
  static constexpr int kRight = kVectors * kLanes<F>;
  static constexpr int64_t kDepth = 192;
};

FL_FN int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Panels: element (k, i) of panel p is at data[p * panel + k * step + i].
template <class R>
struct Panels {
  const R* data;
  int64_t panel, step;
};
template <class R, int kWidth>
FL_FN Panels<R> packed(const R* data, int64_t depth) {
  return {data, depth * kWidth, kWidth};
}

using f32x4 = float __attribute__((vector_size(16)));

// Columns [0, kCount) of rows[kWidth][kCount] become rows of out[kCount][kWidth].
template <int kWidth, int kCount, class R>
FL_FN void transpose(const R* rows, R* out) {
  if constexpr (sizeof(R) == 4 && kWidth % 4 == 0) {
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; i += 4)
#pragma GCC unroll 4
      for (int k = 0; k < kCount; k += 4) {
        f32x4 r[4];
        for (int u = 0; u < 4; ++u) std::memcpy(&r[u], rows + (i + u) * kCount + k, 16);
        const f32x4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5),
                    b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5),
                    c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7),
                    d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
        const f32x4 t[4] = {
            __builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
            __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
        for (int u = 0; u < 4; ++u) std::memcpy(out + (k + u) * kWidth + i, &t[u], 16);
      }
  } else {
    for (int k = 0; k < kCount; ++k)
      for (int i = 0; i < kWidth; ++i) out[k * kWidth + i] = rows[i * kCount + k];
  }
}

// Packs `count` vectors of `depth` elements into panels of kWidth; the last panel is padded with zeros.
// Element (i, k) is at x[i * stride + k * element]; it is multiplied by factor[i] if there is one. `out`
// holds round_up(count, kWidth) * depth numbers.
template <int kWidth, class T, class R>
FL_NOINLINE void pack(const T* x, int64_t stride, int64_t element, int64_t count, int64_t depth, R* out,
                      const R* factor = nullptr) {
  constexpr int kStep = 16;
  constexpr int W = kLanes<vector_t<R>>;
  for (int64_t p = 0; p < count; p += kWidth, out += depth * kWidth, x += kWidth * stride) {
    const int width = static_cast<int>(count - p < kWidth ? count - p : kWidth);
    const R* f = factor ? factor + p : nullptr;
    int64_t k = 0;
    if (element == 1) {  // vectors are rows: transposed in blocks
      alignas(64) R rows[kWidth * kStep] = {};
      for (; k + kStep <= depth; k += kStep) {
        for (int i = 0; i < width; ++i)
          for (int u = 0; u < kStep; u += W) {
            const auto v = load(x + i * stride + k + u);
            store(rows + i * kStep + u, f ? v * f[i] : v);
          }
        transpose<kWidth, kStep>(rows, out + k * kWidth);
      }
    } else if (stride == 1 && kWidth % W == 0 && width == kWidth && !f) {  // vectors are columns: copied
      for (; k < depth; ++k)
        for (int i = 0; i < kWidth; i += W) store(out + k * kWidth + i, load(x + k * element + i));
    } else if (std::is_same_v<T, R> && stride == 1 && width == kWidth && !f) {
      for (; k < depth; ++k) std::memcpy(out + k * kWidth, x + k * element, kWidth * sizeof(R));
    }
    for (; k < depth; ++k)
      for (int i = 0; i < kWidth; ++i) {
        const R v = i < width ? R(widen(x[i * stride + k * element])) : 0;
        out[k * kWidth + i] = f && i < width ? v * f[i] : v;
      }
  }
}

// The micro-kernel: one register tile c[rows, columns] of at most kLeft x kRight.
template <class R>
FL_NOINLINE void multiply_panels(const R* __restrict a, int64_t step, const R* __restrict b, int64_t b_step,
                                 int64_t depth, R* __restrict c, int64_t ldc, int rows, int columns,
                                 bool add) {
  using G = Gemm<R>;
  using F = typename G::F;
  constexpr int W = kLanes<F>;
  F acc[G::kLeft][G::kVectors] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, a += step, b += b_step) {
    F right[G::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < G::kVectors; ++v) right[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < G::kLeft; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < G::kVectors; ++v) acc[i][v] += right[v] * a[i];
  }
  if (rows == G::kLeft && columns == G::kRight) {
#pragma GCC unroll 16
    for (int i = 0; i < G::kLeft; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < G::kVectors; ++v) {
        R* to = c + i * ldc + v * W;
        store(to, add ? load(to) + acc[i][v] : acc[i][v]);
      }
    return;
  }
  alignas(64) R part[G::kLeft][G::kRight];
#pragma GCC unroll 16
  for (int i = 0; i < G::kLeft; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < G::kVectors; ++v) store(&part[i][v * W], acc[i][v]);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) c[i * ldc + j] = add ? c[i * ldc + j] + part[i][j] : part[i][j];
}

// c[m, n] = left right, added to c if `add`. Nothing outside [m, n] is written.
template <class R>
FL_NOINLINE void multiply(Panels<R> left, Panels<R> right, int64_t m, int64_t n, int64_t depth, R* c,
                          int64_t ldc, bool add) {
  using G = Gemm<R>;
  const int64_t blocks = depth > G::kDepth ? (depth + G::kDepth - 1) / G::kDepth : 1;
  const int64_t block = (depth + blocks - 1) / blocks;
  for (int64_t k = 0; k < depth || k == 0; k += block) {
    const int64_t steps = depth - k < block ? depth - k : block;
    for (int64_t j = 0, q = 0; j < n; j += G::kRight, ++q) {
      const R* b = right.data + q * right.panel + k * right.step;
      const int columns = static_cast<int>(n - j < G::kRight ? n - j : G::kRight);
      for (int64_t i = 0, p = 0; i < m; i += G::kLeft, ++p) {
        const int rows = static_cast<int>(m - i < G::kLeft ? m - i : G::kLeft);
        if (i + G::kLeft < m) {  // prefetches the tile of c that is added to next
          const R* next = c + (i + G::kLeft) * ldc + j;
          for (int r = 0; r < G::kLeft; ++r, next += ldc) {
            __builtin_prefetch(next, 1);
            __builtin_prefetch(next + G::kRight - 1, 1);
          }
        }
        multiply_panels(left.data + p * left.panel + k * left.step, left.step, b, right.step, steps,
                        c + i * ldc + j, ldc, rows, columns, add || k > 0);
      }
    }
    if (block == 0) break;
  }
}

// The interface of TileProducts (amx.h) for this GEMM, see linear.cpp: packed operands are opaque bytes.
template <class R>
struct VectorProducts {
  using G = Gemm<R>;
  struct Scope {};
  static constexpr int64_t kRows = 2 * G::kDepth;

  template <bool kIsLeft>
  static constexpr int kWidth = kIsLeft ? G::kLeft : G::kRight;
  template <bool kIsLeft>
  static constexpr int64_t packed_bytes(int64_t count, int64_t depth) {
    return (count + kWidth<kIsLeft> - 1) / kWidth<kIsLeft> * kWidth<kIsLeft> * depth * sizeof(R);
  }
  template <bool kIsLeft, class S>
  static void pack(const S* x, int64_t stride, int64_t element, int64_t count, int64_t depth, char* out) {
    fastloss::pack<kWidth<kIsLeft>>(x, stride, element, count, depth, reinterpret_cast<R*>(out));
  }
  static void multiply(const char* left, const char* right, int64_t m, int64_t n, int64_t depth, R* c,
                       int64_t ldc, bool add) {
    fastloss::multiply<R>(packed<R, G::kLeft>(reinterpret_cast<const R*>(left), depth),
                          packed<R, G::kRight>(reinterpret_cast<const R*>(right), depth), m, n, depth, c, ldc,
                          add);
  }
};

}  // namespace fastloss::inline FL_ISA
