// The matrix of similarities on the CPU, for one instruction set each.
//
// A worker takes the next block of rows and runs through its tiles, one for each block of columns: a GEMM,
// the pass's epilogue while the tile is in the cache, and for a gradient two more GEMMs. Sums over a column
// are added block of rows by block of rows, in order, as a wavefront: a worker waits until the block above
// has done the same tile. So no result depends on the number of workers.
#pragma once
#include "../../drivers/similarity.h"
#include "../dispatch.h"

namespace fastloss::cpu {

inline constexpr int64_t kTile = 192;  // columns of a tile, and rows at most

struct TileCall : TileArgs {
  bool is_double;     // float64, else float32: of all arrays here
  int64_t d;          // features
  const void *x, *y;  // [m, d], [n, d]
  double scale;
  const void *row_ids, *col_ids;  // [m], [n padded to whole tiles]: ids as numbers of the type, or null
  void *panels, *depth_panels;    // y packed for the GEMMs, packed_size() numbers each; the second for dx
  void *dx, *dy;                  // [m, d], [n, d], or null
  void* dots;                     // [m]: <x_i, d s_i / d scale>, with dx; or null
  int64_t row_step;               // rows of a block
  int64_t* next;                  // the next block of rows to take, initially 0
  int64_t* done;                  // [blocks of rows]: tiles done of each, initially 0
};

struct TileKernels {
  int64_t (*packed_size)(const TileCall&);
  void (*pack)(const TileCall&, int64_t begin, int64_t end);  // blocks of kTile rows of y
  void (*run_tiles)(const TileCall&);                         // one worker
};

FASTLOSS_PER_ISA(TileKernels, tile_kernels)

}  // namespace fastloss::cpu
