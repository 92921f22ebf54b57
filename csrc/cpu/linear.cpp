// The products of cpu/linear.h for one instruction set. Every number is summed in blocks of kRowBlock along
// the inner dimension, in order, so its bits depend neither on the chunk nor on the threads.
#include "linear.h"

#include "gemm.h"
#include "scratch.h"

namespace fastloss::inline FL_ISA {
namespace {

using cpu::kClassBlock;
using cpu::kRowBlock;
using cpu::LinearArgs;

FL_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct Linear {
  using R = acc_t<T>;
  using G = Gemm<R>;
  static constexpr int W = kLanes<vector_t<R>>;
  static constexpr int64_t kDepth = G::kDepth;
  static_assert(kRowBlock % G::kLeft == 0 && kRowBlock % kDepth == 0 && kClassBlock % G::kLeft == 0);

  static int64_t packed_size(const LinearArgs& a) {
    return round_up(a.rows, G::kLeft) * round_up(a.features, G::kRight);
  }

  // [rows / kLeft][features][kLeft]
  static void pack_left(const LinearArgs& a, int64_t begin, int64_t end) {
    const int64_t row = begin * kRowBlock, stop = least(end * kRowBlock, a.rows);
    pack<G::kLeft>(static_cast<const R*>(a.x) + row * a.features, a.features, 1, stop - row, a.features,
                   static_cast<R*>(a.panels) + row * a.features);
  }
  // [rows / kRowBlock][features / kRight][kRowBlock][kRight]
  static void pack_right(const LinearArgs& a, int64_t begin, int64_t end) {
    const int64_t width = round_up(a.features, G::kRight);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row = b * kRowBlock, depth = least(kRowBlock, a.rows - row);
      pack<G::kRight>(static_cast<const R*>(a.x) + row * a.features, 1, a.features, a.features, depth,
                      static_cast<R*>(a.panels) + row * width);
    }
  }

  static void logits(const LinearArgs& a, int64_t begin, int64_t end) {
    R* const right =
        static_cast<R*>(cpu::thread_scratch(round_up(kClassBlock, G::kRight) * kDepth * sizeof(R)));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kClassBlock, count = least(kClassBlock, a.n - first);
      R* const out = static_cast<R*>(a.logits) + first;
      if (a.bias)
        for (int64_t r = 0; r < a.rows; ++r)
          std::memcpy(out + r * a.n, static_cast<const R*>(a.bias) + first, count * sizeof(R));
      for (int64_t k = 0; k == 0 || k < a.features; k += kDepth) {
        const int64_t depth = least(kDepth, a.features - k);
        pack<G::kRight>(static_cast<const T*>(a.w) + first * a.w_row + k * a.w_column, a.w_row, a.w_column,
                        count, depth, right);
        const Panels<R> left{static_cast<const R*>(a.panels) + k * G::kLeft, a.features * G::kLeft, G::kLeft};
        multiply<R>(left, packed<R, G::kRight>(right, depth), a.rows, count, depth, out, a.n,
                    a.bias || k > 0);
      }
    }
  }

  static void dx(const LinearArgs& a, int64_t begin, int64_t end) {
    const int64_t across = (a.features + a.tile_columns - 1) / a.tile_columns;
    const int64_t left_size = round_up(a.tile_rows, G::kLeft) * kDepth;
    R* const left = static_cast<R*>(
        cpu::thread_scratch((left_size + round_up(a.tile_columns, G::kRight) * kDepth) * sizeof(R)));
    R* const right = left + left_size;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile / across * a.tile_rows, rows = least(a.tile_rows, a.rows - row);
      const int64_t column = tile % across * a.tile_columns,
                    columns = least(a.tile_columns, a.features - column);
      for (int64_t k = 0; k == 0 || k < a.n; k += kDepth) {
        const int64_t depth = least(kDepth, a.n - k);
        pack<G::kLeft>(static_cast<const R*>(a.logits) + row * a.n + k, a.n, 1, rows, depth, left);
        pack<G::kRight>(static_cast<const T*>(a.w) + k * a.w_row + column * a.w_column, a.w_column, a.w_row,
                        columns, depth, right);
        multiply<R>(packed<R, G::kLeft>(left, depth), packed<R, G::kRight>(right, depth), rows, columns,
                    depth, static_cast<R*>(a.dx) + row * a.features + column, a.features, k > 0);
      }
    }
  }

  // Panels of kLeft columns of g[depth][ld]. Whole vectors are copied, beyond the panel too: what follows is
  // written later, and after the last panel there is room for a vector.
  static void pack_columns(const R* g, int64_t ld, int64_t count, int64_t beyond, int64_t depth, R* out) {
    for (int64_t p = 0; p < count; p += G::kLeft, out += depth * G::kLeft) {
      if (count - p < G::kLeft || count + beyond - p < round_up(G::kLeft, W)) {
        pack<G::kLeft>(g + p, 1, ld, least(G::kLeft, count - p), depth, out);
        continue;
      }
      for (int64_t k = 0; k < depth; ++k)
        for (int i = 0; i < G::kLeft; i += W) store(out + k * G::kLeft + i, load(g + k * ld + p + i));
    }
  }

  static void dw(const LinearArgs& a, int64_t begin, int64_t end) {
    const int64_t width = round_up(a.features, G::kRight);
    R* const left = static_cast<R*>(cpu::thread_scratch((kClassBlock * kRowBlock + 2 * W) * sizeof(R)));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kClassBlock, count = least(kClassBlock, a.n - first);
      const R* const g = static_cast<const R*>(a.logits) + first;
      for (int64_t row = 0; a.dw && row < a.rows; row += kRowBlock) {
        const int64_t depth = least(kRowBlock, a.rows - row);
        pack_columns(g + row * a.n, a.n, count, a.n - first - count, depth, left);
        multiply<R>(packed<R, G::kLeft>(left, depth),
                    packed<R, G::kRight>(static_cast<const R*>(a.panels) + row * width, depth), count,
                    a.features, depth, static_cast<R*>(a.dw) + first * a.features, a.features,
                    a.add || row > 0);
      }
      if (!a.db) continue;
      R* const db = static_cast<R*>(a.db) + first;
      if (!a.add) std::memset(db, 0, count * sizeof(R));
      for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t j = 0; j < count; ++j) db[j] += g[r * a.n + j];
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

// One function of Linear<T>, for the type that the arguments name.
#define FASTLOSS_BY_DTYPE(dtype, call) \
  switch (dtype) {                     \
    case DType::f32:                   \
      return Linear<float>::call;      \
    case DType::f64:                   \
      return Linear<double>::call;     \
    case DType::bf16:                  \
      return Linear<BFloat16>::call;   \
    case DType::f16:                   \
      return Linear<Half>::call;       \
  }                                    \
  __builtin_unreachable();

int64_t packed_size(const LinearArgs& a) { FASTLOSS_BY_DTYPE(a.dtype, packed_size(a)) }
void pack_left(const LinearArgs& a, int64_t begin, int64_t end) {
  FASTLOSS_BY_DTYPE(a.dtype, pack_left(a, begin, end))
}
void pack_right(const LinearArgs& a, int64_t begin, int64_t end) {
  FASTLOSS_BY_DTYPE(a.dtype, pack_right(a, begin, end))
}
void logits(const LinearArgs& a, int64_t begin, int64_t end) {
  FASTLOSS_BY_DTYPE(a.dtype, logits(a, begin, end))
}
void dx(const LinearArgs& a, int64_t begin, int64_t end) { FASTLOSS_BY_DTYPE(a.dtype, dx(a, begin, end)) }
void dw(const LinearArgs& a, int64_t begin, int64_t end) { FASTLOSS_BY_DTYPE(a.dtype, dw(a, begin, end)) }
void scale(const void* in, double factor, DType dtype, void* out, int64_t begin, int64_t end) {
  FASTLOSS_BY_DTYPE(dtype, scale(in, factor, out, begin, end))
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

#define FASTLOSS_JOIN_(a, b) a##b
#define FASTLOSS_JOIN(a, b) FASTLOSS_JOIN_(a, b)

namespace fastloss::cpu {
const LinearKernels FASTLOSS_JOIN(linear_, FL_ISA) = {&packed_size, &pack_left, &pack_right, &logits,
                                                      &dx,          &dw,        &scale};
}  // namespace fastloss::cpu
