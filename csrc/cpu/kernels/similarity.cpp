// The loop over tiles of cpu/kernels/similarity.h, and the choice of its epilogue, for one instruction set.
#include "similarity.h"

#include <sched.h>

#include <algorithm>

#include "../scratch.h"
#include "gemm.h"
#include "similarity_passes.h"

namespace fastloss::inline FL_ISA {
namespace {

using cpu::kTile;
using cpu::TileCall;

template <class R, TilePass kPass>
class TileKernel {
  using G = Gemm<R>;
  using Pass = TileEpilogue<R, kPass>;
  static_assert(kTile % G::kLeft == 0 && kTile % G::kRight == 0);

 public:
  explicit TileKernel(const TileCall& a) : a_(a), width_(round_up(a.d, G::kRight)), pass_(a) {
    const int64_t rows = round_up(a.row_step, G::kLeft), left = rows * a.d, right = a.row_step * width_;
    R* at = static_cast<R*>(
        cpu::thread_scratch((left + right + 2 * kTile * kTile + kTile + Pass::kScratch) * sizeof(R)));
    const auto take = [&](int64_t count) {
      R* p = at;
      at += count;
      return p;
    };
    tile_ = take(kTile * kTile);
    packed_tile_ = take(kTile * kTile);
    scales_ = take(kTile);
    for (int64_t i = 0; i < kTile; ++i) scales_[i] = R(a.scale);
    pass_.scratch(take(Pass::kScratch));
    right_ = take(right);
    left_ = take(left);
  }

  void run() {
    for (;;) {
      const int64_t block = __atomic_fetch_add(a_.next, 1, __ATOMIC_RELAXED);
      if (block * a_.row_step >= a_.m) return;
      rows(block);
    }
  }

 private:
  void rows(int64_t block) {
    const int64_t row = block * a_.row_step, count = std::min<int64_t>(a_.row_step, a_.m - row);
    const bool last = row + count == a_.m;
    const R* x = static_cast<const R*>(a_.x) + row * a_.d;
    const bool itself = a_.x == a_.y;
    pack<G::kLeft>(x, a_.d, 1, count, a_.d, left_, itself ? nullptr : scales_);
    if (a_.dy) pack<G::kRight>(x, 1, a_.d, a_.d, count, right_);
    pass_.begin_rows(row, count);
    int64_t column = 0;
    for (int64_t c = 0; column < a_.n; ++c, column += kTile) {
      const int64_t columns = std::min<int64_t>(kTile, a_.n - column);
      multiply<R>(packed<R, G::kLeft>(left_, a_.d),
                  packed<R, G::kRight>(static_cast<const R*>(a_.panels) + column * a_.d, a_.d), count,
                  columns, a_.d, tile_, kTile, false);
      if (itself)  // here, so that s[i, j] and s[j, i] are the same bits
        for (int64_t r = 0; r < count; ++r)
          for (int64_t j = 0; j < columns; ++j) tile_[r * kTile + j] *= R(a_.scale);
      pass_.tile(tile_, column, columns);
      if (a_.dx) {
        pack<G::kLeft>(tile_, kTile, 1, count, columns, packed_tile_);
        multiply<R>(packed<R, G::kLeft>(packed_tile_, columns),
                    packed<R, G::kRight>(static_cast<const R*>(a_.depth_panels) + column * width_, columns),
                    count, a_.d, columns, static_cast<R*>(a_.dx) + row * a_.d, a_.d, c > 0);
      }
      if (!a_.dy && !(Pass::kColumns && a_.col_max)) continue;
      if (block > 0)
        while (__atomic_load_n(a_.done + block - 1, __ATOMIC_ACQUIRE) <= c) sched_yield();
      pass_.columns(column, columns, last);
      if (a_.dy) {
        R* dy = static_cast<R*>(a_.dy) + column * a_.d;
        multiply<R>(Panels<R>{tile_, G::kLeft, kTile}, packed<R, G::kRight>(right_, count), columns, a_.d,
                    count, dy, a_.d, block > 0);
        if (last)
          for (int64_t i = 0; i < columns * a_.d; ++i) dy[i] *= R(a_.scale);
      }
      __atomic_store_n(a_.done + block, c + 1, __ATOMIC_RELEASE);
    }
    pass_.end_rows();
    if (a_.dx) finish(row, count);
  }

  FL_NOINLINE void finish(int64_t row, int64_t count) {
    for (int64_t i = row; i < row + count; ++i) {
      const R* x = static_cast<const R*>(a_.x) + i * a_.d;
      R* dx = static_cast<R*>(a_.dx) + i * a_.d;
      if (a_.dots) {
        constexpr int W = kLanes<vector_t<R>>;
        vector_t<R> sum{};
        int64_t k = 0;
        for (; k + W <= a_.d; k += W) sum += load(x + k) * load(dx + k);
        if (k < a_.d) sum += load_part(x + k, a_.d - k, R(0)) * load_part(dx + k, a_.d - k, R(0));
        static_cast<R*>(a_.dots)[i] = horizontal_sum(sum);
      }
      for (int64_t k = 0; k < a_.d; ++k) dx[k] *= R(a_.scale);
    }
  }

  const TileCall& a_;
  const int64_t width_;
  Pass pass_;
  R *tile_, *packed_tile_, *scales_, *left_, *right_;
};

template <class R>
int64_t packed_size(const TileCall& a) {
  return round_up(a.n, Gemm<R>::kRight) * round_up(a.d, Gemm<R>::kRight);
}
// [n / kRight][d][kRight], and [n / kTile][d / kRight][kTile][kRight]
template <class R>
void pack_y(const TileCall& a, int64_t begin, int64_t end) {
  constexpr int kRight = Gemm<R>::kRight;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kTile, count = std::min<int64_t>(kTile, a.n - first);
    const R* y = static_cast<const R*>(a.y) + first * a.d;
    pack<kRight>(y, a.d, 1, count, a.d, static_cast<R*>(a.panels) + first * a.d);
    if (a.depth_panels)
      pack<kRight>(y, 1, a.d, a.d, count, static_cast<R*>(a.depth_panels) + first * round_up(a.d, kRight));
  }
}
template <class R>
void run_tiles(const TileCall& a) {
  switch (a.pass) {
    case TilePass::statistics:
      return TileKernel<R, TilePass::statistics>(a).run();
    case TilePass::softmax_gradient:
      return TileKernel<R, TilePass::softmax_gradient>(a).run();
    case TilePass::pairs:
      return TileKernel<R, TilePass::pairs>(a).run();
    case TilePass::pairs_gradient:
      return TileKernel<R, TilePass::pairs_gradient>(a).run();
    case TilePass::sigmoid:
      return TileKernel<R, TilePass::sigmoid>(a).run();
    case TilePass::hardest:
      return TileKernel<R, TilePass::hardest>(a).run();
  }
}

int64_t packed_size(const TileCall& a) {
  return a.is_double ? packed_size<double>(a) : packed_size<float>(a);
}
void pack_y(const TileCall& a, int64_t begin, int64_t end) {
  a.is_double ? pack_y<double>(a, begin, end) : pack_y<float>(a, begin, end);
}
void run_tiles(const TileCall& a) { a.is_double ? run_tiles<double>(a) : run_tiles<float>(a); }

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
FASTLOSS_OF_ISA(TileKernels, tile_kernels) = {&packed_size, &pack_y, &run_tiles};
}  // namespace fastloss::cpu
