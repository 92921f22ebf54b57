// The products of cpu/kernels/linear.h for one instruction set. Every number is summed in blocks of kDepth
// along the inner dimension, in order, so its bits depend neither on the chunk nor on the threads.
#include "linear.h"

#include <algorithm>

#include "../scratch.h"
#include "gemm.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace fastloss::inline FL_ISA {
namespace {

using cpu::kClassBlock;
using cpu::kDepth;
using cpu::kRowBlock;
using cpu::LinearArgs;

template <class T>
struct ProductsOf {
  using type = VectorProducts<acc_t<T>>;
};
#if defined(__AMX_BF16__)
template <>
struct ProductsOf<float> {
  using type = TileProducts<3>;
};
template <>
struct ProductsOf<Half> {
  using type = TileProducts<2>;
};
template <>
struct ProductsOf<BFloat16> {
  using type = TileProducts<1>;
};
#endif

template <class T>
struct Linear {
  using R = acc_t<T>;
  using P = typename ProductsOf<T>::type;
  static constexpr int W = kLanes<vector_t<R>>;
  static constexpr int64_t kRows = P::kRows;

  static char* scratch(int64_t bytes) { return static_cast<char*>(cpu::thread_scratch(bytes)); }

  static int64_t packed_bytes(const LinearArgs& a) {
    const int64_t left = (a.features + kDepth - 1) / kDepth * P::template packed_bytes<true>(a.rows, kDepth),
                  right =
                      (a.rows + kDepth - 1) / kDepth * P::template packed_bytes<false>(a.features, kDepth);
    return left > right ? left : right;
  }

  // [features / kDepth][panels of rows]
  static void pack_left(const LinearArgs& a, int64_t begin, int64_t end) {
    const int64_t row = begin * kRowBlock, stop = std::min<int64_t>(end * kRowBlock, a.rows);
    char* out = static_cast<char*>(a.panels);
    for (int64_t k = 0; k < a.features; k += kDepth) {
      const int64_t depth = std::min<int64_t>(kDepth, a.features - k);
      P::template pack<true>(static_cast<const R*>(a.x) + row * a.features + k, a.features, 1, stop - row,
                             depth, out + P::template packed_bytes<true>(row, depth));
      out += P::template packed_bytes<true>(a.rows, depth);
    }
  }
  // [rows / kDepth][panels of features]
  static void pack_right(const LinearArgs& a, int64_t begin, int64_t end) {
    static_assert(kRowBlock == kDepth);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row = b * kDepth, depth = std::min<int64_t>(kDepth, a.rows - row);
      P::template pack<false>(
          static_cast<const R*>(a.x) + row * a.features, 1, a.features, a.features, depth,
          static_cast<char*>(a.panels) + b * P::template packed_bytes<false>(a.features, kDepth));
    }
  }

  static void logits(const LinearArgs& a, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename P::Scope scope{};
    char* const right = scratch(P::template packed_bytes<false>(kClassBlock, kDepth));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kClassBlock, count = std::min<int64_t>(kClassBlock, a.n - first);
      R* const out = static_cast<R*>(a.logits) + first;
      if (a.bias)
        for (int64_t r = 0; r < a.rows; ++r)
          std::memcpy(out + r * a.n, static_cast<const R*>(a.bias) + first, count * sizeof(R));
      const char* left = static_cast<const char*>(a.panels);
      for (int64_t k = 0; k == 0 || k < a.features; k += kDepth) {
        const int64_t depth = std::min<int64_t>(kDepth, a.features - k);
        P::template pack<false>(static_cast<const T*>(a.w) + first * a.w_row + k * a.w_column, a.w_row,
                                a.w_column, count, depth, right);
        for (int64_t row = 0; row < a.rows; row += kRows)
          P::multiply(left + P::template packed_bytes<true>(row, depth), right,
                      std::min<int64_t>(kRows, a.rows - row), count, depth, out + row * a.n, a.n,
                      a.bias || k > 0);
        left += P::template packed_bytes<true>(a.rows, depth);
      }
    }
  }

  static void dx(const LinearArgs& a, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename P::Scope scope{};
    const int64_t across = (a.features + a.tile_columns - 1) / a.tile_columns;
    const int64_t left_bytes = P::template packed_bytes<true>(kRows, kDepth);
    char* const left = scratch(left_bytes + P::template packed_bytes<false>(a.tile_columns, kDepth));
    char* const right = left + left_bytes;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t top = tile / across * a.tile_rows, bottom = std::min<int64_t>(top + a.tile_rows, a.rows);
      const int64_t column = tile % across * a.tile_columns,
                    columns = std::min<int64_t>(a.tile_columns, a.features - column);
      for (int64_t k = 0; k == 0 || k < a.n; k += kDepth) {
        const int64_t depth = std::min<int64_t>(kDepth, a.n - k);
        P::template pack<false>(static_cast<const T*>(a.w) + k * a.w_row + column * a.w_column, a.w_column,
                                a.w_row, columns, depth, right);
        for (int64_t row = top; row < bottom; row += kRows) {
          const int64_t rows = std::min<int64_t>(kRows, bottom - row);
          P::template pack<true>(static_cast<const R*>(a.logits) + row * a.n + k, a.n, 1, rows, depth, left);
          P::multiply(left, right, rows, columns, depth, static_cast<R*>(a.dx) + row * a.features + column,
                      a.features, k > 0);
        }
      }
    }
  }

  static void dw(const LinearArgs& a, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename P::Scope scope{};
    char* const left = scratch(P::template packed_bytes<true>(kClassBlock, kDepth));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kClassBlock, count = std::min<int64_t>(kClassBlock, a.n - first);
      const R* const g = static_cast<const R*>(a.logits) + first;
      const char* right = static_cast<const char*>(a.panels);
      for (int64_t row = 0; a.dw && row < a.rows; row += kDepth) {
        const int64_t depth = std::min<int64_t>(kDepth, a.rows - row);
        P::template pack<true>(g + row * a.n, 1, a.n, count, depth, left);
        P::multiply(left, right, count, a.features, depth, static_cast<R*>(a.dw) + first * a.features,
                    a.features, a.add || row > 0);
        right += P::template packed_bytes<false>(a.features, kDepth);
      }
      if (!a.db) continue;
      double sum[kClassBlock] = {};  // of as many terms as there are rows, which may cancel
      for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t j = 0; j < count; ++j) sum[j] += g[r * a.n + j];
      R* const db = static_cast<R*>(a.db) + first;
      for (int64_t j = 0; j < count; ++j) db[j] = R(a.add ? sum[j] + db[j] : sum[j]);
    }
  }

  static void scale(const void* in, double factor, void* out, int64_t begin, int64_t end) {
    const R* from = static_cast<const R*>(in);
    T* to = static_cast<T*>(out);
    const R f = R(factor);
    int64_t i = begin;
    for (; i + W <= end; i += W) store(to + i, load(from + i) * f);
    if (i < end) store_part(to + i, load_part(from + i, end - i, R(0)) * f, end - i);
  }
};

int64_t packed_bytes(const LinearArgs& a) {
  return with_type(a.dtype, [&]<class T> { return Linear<T>::packed_bytes(a); });
}
void pack_left(const LinearArgs& a, int64_t begin, int64_t end) {
  return with_type(a.dtype, [&]<class T> { return Linear<T>::pack_left(a, begin, end); });
}
void pack_right(const LinearArgs& a, int64_t begin, int64_t end) {
  return with_type(a.dtype, [&]<class T> { return Linear<T>::pack_right(a, begin, end); });
}
void logits(const LinearArgs& a, int64_t begin, int64_t end) {
  return with_type(a.dtype, [&]<class T> { return Linear<T>::logits(a, begin, end); });
}
void dx(const LinearArgs& a, int64_t begin, int64_t end) {
  return with_type(a.dtype, [&]<class T> { return Linear<T>::dx(a, begin, end); });
}
void dw(const LinearArgs& a, int64_t begin, int64_t end) {
  return with_type(a.dtype, [&]<class T> { return Linear<T>::dw(a, begin, end); });
}
void scale(const void* in, double factor, DType dtype, void* out, int64_t begin, int64_t end) {
  return with_type(dtype, [&]<class T> { return Linear<T>::scale(in, factor, out, begin, end); });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
FASTLOSS_OF_ISA(LinearKernels, linear_kernels) = {&packed_bytes, &pack_left, &pack_right, &logits,
                                                  &dx,           &dw,        &scale};
}  // namespace fastloss::cpu
