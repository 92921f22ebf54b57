// The passes over a matrix of similarities that the contrastive losses are made of
// (fastloss/_ops/similarity.py combines them): on the CPU the whole matrix in tiles, GEMM and epilogue; on
// CUDA the epilogue of one block, whose products are in memory.
#include <algorithm>
#include <limits>

#include "../cpu/kernels/similarity.h"
#include "runtime.h"

namespace fastloss {
namespace {

// The arrays that both operators take, in the order of the schema.
struct Arrays {
  const OptionalTensor &row_max, &row_log_sum, &row_grad, &col_max, &col_log_sum, &col_grad, &positive,
      &positive_grad, &col_positive_grad, &hardest;
};
#define FASTLOSS_TILE_ARRAYS                                                                             \
  "Tensor? target_col, Tensor? row_ids, Tensor? col_ids, Tensor(a!)? row_max, Tensor(b!)? row_log_sum, " \
  "Tensor(c!)? row_grad, Tensor(d!)? col_max, Tensor(e!)? col_log_sum, Tensor? col_grad, Tensor(f!)? "   \
  "positive, Tensor? positive_grad, Tensor? col_positive_grad, Tensor(g!)? hardest"

void* data(const OptionalTensor& t, const char* name, ScalarType type, int64_t count) {
  if (!t) return nullptr;
  FL_CHECK(t->is_contiguous() && t->numel() == count && t->scalar_type() == type, name, ": expected ", count,
           " numbers of the accumulation type");
  return const_cast<void*>(t->const_data_ptr());
}

template <class Args>
void fill(Args& a, int64_t pass, bool labels_are_positives, bool positives_in_denominator, int64_t m,
          int64_t n, ScalarType type, const OptionalTensor& target_col, const Arrays& t) {
  a.pass = enum_of<TilePass>(pass, "kind");
  a.labels_are_positives = labels_are_positives;
  a.positives_in_denominator = positives_in_denominator;
  a.m = m;
  a.n = n;
  a.target_col = static_cast<const int64_t*>(data(target_col, "target_col", ScalarType::Long, m));
  a.row_max = data(t.row_max, "row_max", type, m);
  a.row_log_sum = data(t.row_log_sum, "row_log_sum", type, m);
  a.row_grad = data(t.row_grad, "row_grad", type, m);
  a.col_max = data(t.col_max, "col_max", type, n);
  a.col_log_sum = data(t.col_log_sum, "col_log_sum", type, n);
  a.col_grad = data(t.col_grad, "col_grad", type, n);
  a.positive = data(t.positive, "positive", type, m);
  a.positive_grad = data(t.positive_grad, "positive_grad", type, m);
  a.col_positive_grad = data(t.col_positive_grad, "col_positive_grad", type, n);
  a.hardest = static_cast<int64_t*>(data(t.hardest, "hardest", ScalarType::Long, 2 * m));
}

// s [rows, cols]: the products of rows `row`, row + 1, ... of all m and columns `col`, col + 1, ... of all
// n. The gradient is written to g, or in place to s; its contribution to the scale's gradient, row by row,
// to dots.
void tile_chunk(int64_t pass, bool labels_are_positives, bool positives_in_denominator, Tensor s,
                OptionalTensor g, Tensor scale, OptionalTensor bias, int64_t row, int64_t m, int64_t col,
                int64_t n, OptionalTensor target_col, OptionalTensor row_ids, OptionalTensor col_ids,
                OptionalTensor row_max, OptionalTensor row_log_sum, OptionalTensor row_grad,
                OptionalTensor col_max, OptionalTensor col_log_sum, OptionalTensor col_grad,
                OptionalTensor positive, OptionalTensor positive_grad, OptionalTensor col_positive_grad,
                OptionalTensor hardest, OptionalTensor dots) {
  const ScalarType type = s.scalar_type();
  const auto lies_well = [&](const Tensor& t) {
    return t.dim() == 2 && t.size(0) == s.size(0) && t.size(1) == s.size(1) &&
           (t.size(1) < 2 || t.stride(1) == 1) && t.stride(0) % 8 == 0 && t.stride(0) >= t.size(1) &&
           reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  };
  FL_CHECK((type == ScalarType::Float || type == ScalarType::Double) && lies_well(s),
           "s: expected rows that begin 16 bytes apart or multiples of it, of the accumulation type");
  TileChunk a{};
  fill(a, pass, labels_are_positives, positives_in_denominator, m, n, type, target_col,
       {row_max, row_log_sum, row_grad, col_max, col_log_sum, col_grad, positive, positive_grad,
        col_positive_grad, hardest});
  a.is_double = type == ScalarType::Double;
  a.s = s.const_data_ptr();
  a.s_pitch = s.stride(0);
  a.g = g ? g->mutable_data_ptr() : s.mutable_data_ptr();
  a.g_type = dtype_of(g ? *g : s, "g");
  a.g_pitch = g ? g->stride(0) : a.s_pitch;
  FL_CHECK(!g || (lies_well(*g) &&
                  (g->scalar_type() == type || (!a.is_double && g->scalar_type() != ScalarType::Double))),
           "g: expected as many rows as of s, of its type or a smaller one");
  a.dots = data(dots, "dots", type, m);
  a.scale_at = data(scale, "scale", type, 1);
  a.bias_at = data(bias, "bias", type, 1);
  a.row = row;
  a.rows = s.size(0);
  a.col = col;
  a.cols = s.size(1);
  FL_CHECK(row >= 0 && row + a.rows <= m && col >= 0 && col + a.cols <= n && a.cols < 1 << 30,
           "s: expected a block of the ", m, " x ", n, " that there are");
  a.row_ids = static_cast<const int64_t*>(data(row_ids, "row_ids", ScalarType::Long, m));
  a.col_ids = static_cast<const int64_t*>(data(col_ids, "col_ids", ScalarType::Long, n));
  if (!a.rows || !a.cols) return;
  const int64_t numbers[] = {call_cuda(FASTLOSS_CUDA_FUNCTION(tile_partials), a)};
  const Tensor part = empty(s, numbers, type);
  a.part = part.mutable_data_ptr();
  launch_on_cuda(s, FASTLOSS_CUDA_FUNCTION(tile_chunk), a);
}

#if !defined(FL_SIMT)

// Ids as numbers of R, which vectors compare: the ids themselves if all are exact in R, else their ranks.
template <class R>
struct Codes {
  std::vector<R> row, col;
  Codes(const int64_t* rows, int64_t m, const int64_t* cols, int64_t n, int64_t padded)
      : row(m), col(padded, std::numeric_limits<R>::quiet_NaN()) {
    constexpr int64_t kExact = 1 << 24;
    const auto small = [](int64_t id) { return -kExact <= id && id <= kExact; };
    if (std::all_of(rows, rows + m, small) && std::all_of(cols, cols + n, small)) {
      std::copy(rows, rows + m, row.begin());
      std::copy(cols, cols + n, col.begin());
      return;
    }
    std::vector<int64_t> all(rows, rows + m);
    all.insert(all.end(), cols, cols + n);
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    const auto rank = [&](int64_t id) {
      return R(std::lower_bound(all.begin(), all.end(), id) - all.begin());
    };
    std::transform(rows, rows + m, row.begin(), rank);
    std::transform(cols, cols + n, col.begin(), rank);
  }
};

// Rows of a block, fewer where there are few: a function of m alone, since sums depend on it.
int64_t rows_of_a_block(int64_t m) { return std::clamp<int64_t>((m + 7) / 8 + 23, 24, cpu::kTile) / 24 * 24; }

template <class R>
void run_tiles(cpu::TileCall& a, const Tensor& x, const Tensor& y, const OptionalTensor& row_ids,
               const OptionalTensor& col_ids) {
  const int64_t blocks = (a.n + cpu::kTile - 1) / cpu::kTile;
  std::optional<Codes<R>> codes;
  if (row_ids) {
    codes.emplace(static_cast<const int64_t*>(data(row_ids, "row_ids", ScalarType::Long, a.m)), a.m,
                  static_cast<const int64_t*>(data(col_ids, "col_ids", ScalarType::Long, a.n)), a.n,
                  blocks * cpu::kTile);
    a.row_ids = codes->row.data();
    a.col_ids = codes->col.data();
  }
  const cpu::TileKernels& kernels = cpu::tile_kernels.best();
  const int64_t size[] = {kernels.packed_size(a)};
  const Tensor panels = empty_pooled(y, size, y.scalar_type());
  std::optional<Tensor> depth_panels;
  a.panels = panels.mutable_data_ptr();
  if (a.dx) {
    depth_panels = empty_pooled(y, size, y.scalar_type());
    a.depth_panels = depth_panels->mutable_data_ptr();
  }
  a.row_step = rows_of_a_block(a.m);
  const int64_t row_blocks = (a.m + a.row_step - 1) / a.row_step;
  std::vector<int64_t> done(row_blocks, 0);
  int64_t next = 0;
  a.done = done.data();
  a.next = &next;
  const bool alone = a.m * a.n * a.d < 1 << 18;
  const int64_t workers = alone ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), row_blocks);
  if (workers == 1) {
    kernels.pack(a, 0, blocks);
    return kernels.run_tiles(a);
  }
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) { kernels.pack(a, b, e); });
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { kernels.run_tiles(a); });
}

void tile_walk(int64_t pass, bool labels_are_positives, bool positives_in_denominator, Tensor x, Tensor y,
               double scale, double bias, OptionalTensor target_col, OptionalTensor row_ids,
               OptionalTensor col_ids, OptionalTensor row_max, OptionalTensor row_log_sum,
               OptionalTensor row_grad, OptionalTensor col_max, OptionalTensor col_log_sum,
               OptionalTensor col_grad, OptionalTensor positive, OptionalTensor positive_grad,
               OptionalTensor col_positive_grad, OptionalTensor hardest, OptionalTensor dx, OptionalTensor dy,
               OptionalTensor dots) {
  const ScalarType type = x.scalar_type();
  FL_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x: expected the accumulation type");
  FL_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.is_contiguous() && y.is_contiguous() &&
               y.scalar_type() == type,
           "x, y: expected rows of the same features without gaps");
  cpu::TileCall a{};
  a.is_double = type == ScalarType::Double;
  a.d = x.size(1);
  fill(a, pass, labels_are_positives, positives_in_denominator, x.size(0), y.size(0), type, target_col,
       {row_max, row_log_sum, row_grad, col_max, col_log_sum, col_grad, positive, positive_grad,
        col_positive_grad, hardest});
  if (a.m == 0 || a.n == 0) return;
  a.x = x.const_data_ptr();
  a.y = y.const_data_ptr();
  a.scale = scale;
  a.bias = bias;
  a.dx = data(dx, "dx", type, a.m * a.d);
  a.dy = data(dy, "dy", type, a.n * a.d);
  a.dots = data(dots, "dots", type, a.m);
  a.is_double ? run_tiles<double>(a, x, y, row_ids, col_ids) : run_tiles<float>(a, x, y, row_ids, col_ids);
}

#endif

void define(StableLibrary& m) {
  m.def(
      "tile_walk(int kind, bool labels_are_positives, bool positives_in_denominator, Tensor x, Tensor y, "
      "float scale, "
      "float bias, " FASTLOSS_TILE_ARRAYS ", Tensor(h!)? dx, Tensor(i!)? dy, Tensor(j!)? dots) -> ()");
  m.def(
      "tile_chunk(int kind, bool labels_are_positives, bool positives_in_denominator, Tensor(z!) s, "
      "Tensor(y!)? g, Tensor "
      "scale, Tensor? bias, int row, int m, int col, int n, " FASTLOSS_TILE_ARRAYS
      ", Tensor(x!)? dots) -> ()");
}
void implement_chunk(StableLibrary& m) { m.impl("tile_chunk", TORCH_BOX(&tile_chunk)); }
#if !defined(FL_SIMT)
void implement_walk(StableLibrary& m) { m.impl("tile_walk", TORCH_BOX(&tile_walk)); }
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLOSS_NAMESPACE, m) { define(m); }
FASTLOSS_CUDA_OPERATORS(implement_chunk)
#if !defined(FL_SIMT)
FASTLOSS_CPU_OPERATORS(implement_walk)
#endif

}  // namespace fastloss
