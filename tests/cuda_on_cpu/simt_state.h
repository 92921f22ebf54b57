// What the scheduler (simt.cpp) and the collectives (simt_warp.cpp) know of the blocks that run.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "simt.h"
#include "simt_fiber.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace simt {

enum class State : uint8_t { ready, at_barrier, at_cluster_barrier, at_collective, returned };

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes, zero_fill, batch;
};

struct Lane : Thread, Fiber {
  State state;
  // where it waits, and for a collective what it brought and gets
  Where where;
  Op op;
  unsigned mask;
  int source;
  size_t bytes;
  alignas(8) char brought[8], result[8];
  std::vector<AsyncCopy> copies;  // not yet waited for
  size_t batch;
};

struct Warp {
  unsigned exists, returned, arrived;  // a bit a lane
};

struct Block {
  std::vector<Lane> lanes;  // of the largest block so far; the first `size` are in use
  std::vector<Warp> warps;
  Index index;
  unsigned rank = 0;  // in its cluster
  unsigned size = 0, at_barrier = 0, returned = 0, predicates = 0;
  Where barrier;
  int barrier_count = 0;  // predicates at the last barrier
  uint64_t serial = 0;    // of all blocks ever run
  size_t static_bytes = 0, dynamic_bytes = 0;
  void* dynamic = nullptr;
  std::vector<SharedArray*> arrays;  // that it has
  int mapped = -1;                   // barriers of the cluster when a peer last asked for its shared memory,
  Where mapped_by;                   //   and where
  std::string error;
};
extern Block* block;  // the one that is stepped

struct Cluster {
  Block blocks[kMaxCluster];
  unsigned size = 1, at_barrier = 0;
  int barriers = 0;  // completed
  Where barrier;
};
extern Cluster cluster;

inline Lane& self() { return *static_cast<Lane*>(current); }
inline Lane* lanes_of(unsigned warp) { return &block->lanes[warp * 32]; }
std::string text(const Where& where);    // "file.cu:12"
std::string describe(const Lane& lane);  // what it waits for

// Completes the collective that `lane` waits at, if all that its mask names have arrived.
bool try_complete(Lane& lane);
// After a lane has returned: is it still waited for?
void check_departure(const Lane& lane);

}  // namespace simt
