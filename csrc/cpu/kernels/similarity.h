// The matrix of similarities on the CPU, for one instruction set each.
//
// Workers take blocks of rows in turn and walk along the blocks of columns: a product, what the pass makes of
// the tile while it lies in the cache, and for a gradient two more products. What columns add up, block of
// rows after block of rows does in order: a worker waits until the block above has done that tile. So no
// result depends on the number of workers.
#pragma once
#include "../../drivers/similarity.h"
#include "../dispatch.h"

namespace fastloss::cpu {

inline constexpr int64_t kTile = 192;  // columns of a tile, and rows at most

struct TileCall : TileArgs {
  bool wide;          // float64, else float32: of all arrays here
  int64_t d;          // features
  const void *x, *y;  // [m, d], [n, d]
  double scale;
  const void *row_ids, *col_ids;  // [m], [n padded to whole tiles]: numbers that are equal or not, or null
  void *panels, *depth_panels;    // y packed, room for packed_size() each; the second for gradients of x
  void *dx, *dy;                  // [m, d], [n, d], or null
  void* dots;                     // [m]: <x_i, d s_i / d scale>, with dx; or null
  int64_t row_step;               // rows of a block
  int64_t* next;                  // the next block of rows to take; 0
  int64_t* done;                  // [blocks of rows]: blocks of columns that it has done; 0
};

struct TileKernels {
  int64_t (*packed_size)(const TileCall&);
  void (*pack)(const TileCall&, int64_t begin, int64_t end);  // blocks of kTile rows of y
  void (*walk)(const TileCall&);                              // one worker
};

FASTLOSS_PER_ISA(TileKernels, tile_kernels)

}  // namespace fastloss::cpu
