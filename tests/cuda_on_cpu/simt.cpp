// The scheduler: steps the fibers of the blocks of a cluster, warp by warp, until all have returned or wait for
// each other. A launch without clusters is one with clusters of one block.
#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <random>

#include "simt_race.h"
#include "simt_state.h"

namespace simt {

Thread* current = nullptr;
Index block_index;
dim3 block_dim, grid_dim;
Cluster cluster;
Block* block = &cluster.blocks[0];

namespace {

constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr size_t kMaxStaticShared = 48 << 10, kMaxDynamicShared = 227 << 10;

std::mutex launch_mutex;
thread_local bool launching = false;
Stacks stacks;  // kMaxThreads for each block of a cluster
unsigned blocks_with_stacks = 0, threads_with_stacks = 0;
uint64_t blocks_run = 0;
bool in_fiber = false;
Body body;
void* body_context;

void fiber_main() {
  Fiber::begin();
  std::string thrown;
  try {
    body(body_context);
  } catch (const std::exception& e) {
    thrown = e.what();
  }
  if (!thrown.empty()) fail("the kernel threw: " + thrown);
  Lane& me = self();
  me.state = State::returned;
  ++block->returned;
  block->warps[me.warp].returned |= 1u << me.lane;
  me.leave(Fiber::finished);
  __builtin_trap();
}

void step(Lane& lane) {
  current = &lane;
  in_fiber = true;
  lane.enter();
  in_fiber = false;
}

// Filled with what reads as NaN in every floating type.
void make_fresh(void* memory, size_t bytes) {
  std::memset(memory, 0xff, bytes);
  race::fresh_shared(memory, bytes);
}

void* allocate(size_t bytes, size_t align) {  // exactly sized, so that an overrun leaves it
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max<size_t>(align, 16), std::max<size_t>(bytes, 1)))
    throw std::bad_alloc();
  return memory;
}

std::string text(const Index& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string deadlock() {
  std::map<std::string, std::pair<unsigned, std::string>> groups;  // what they wait for: how many, the first
  for (unsigned b = 0; b < cluster.size; ++b) {
    const Block& in = cluster.blocks[b];
    for (unsigned i = 0; i < in.size; ++i) {
      auto& [count, first] = groups[describe(in.lanes[i])];
      if (!count++)
        first = (cluster.size > 1 ? "block " + text(in.index) + " thread " : "") + std::to_string(i);
    }
  }
  std::string s = "deadlock:";
  for (const auto& [what, who] : groups)
    s += " " + std::to_string(who.first) + " thread(s) " + what + " (first: " + who.second + ");";
  return s;
}

void make_ready(Block& b) {
  for (unsigned i = 0; i < b.size; ++i) b.lanes[i].state = State::ready;
}

// Lets the threads of a block, or of the cluster, go on from a barrier at which all of them wait; false if
// there is none.
bool release_barriers() {
  bool released = false;
  unsigned threads = 0;
  for (unsigned b = 0; b < cluster.size; ++b) {
    Block& at = cluster.blocks[b];
    threads += at.size;
    if (at.at_barrier < at.size) continue;
    at.barrier_count = static_cast<int>(std::exchange(at.predicates, 0));
    at.at_barrier = 0;
    make_ready(at);
    race::block_barrier(b);
    released = true;
  }
  if (cluster.at_barrier < threads) return released;
  cluster.at_barrier = 0;
  ++cluster.barriers;
  for (unsigned b = 0; b < cluster.size; ++b) make_ready(cluster.blocks[b]);
  race::cluster_barrier();
  return true;
}

// Steps the lanes of one warp until none can go on; false if none could from the start.
bool run_warp(unsigned w, bool reversed) {
  const unsigned low = w * 32, high = std::min(low + 32, block->size);
  bool progress = false;
  for (bool more = true; more;) {
    more = false;
    for (unsigned k = low; k < high; ++k) {
      Lane& lane = block->lanes[reversed ? high - 1 - (k - low) : k];
      if (lane.state != State::ready) continue;
      step(lane);
      if (!block->error.empty()) throw Error(block->error);
      if (lane.state == State::returned) check_departure(lane);
      more = progress = true;
    }
  }
  return progress;
}

void begin_block(Block& b) {
  b.at_barrier = b.returned = b.predicates = 0;
  b.static_bytes = 0;
  b.serial = ++blocks_run;
  b.arrays.clear();
  b.mapped = -1;
  b.error.clear();
  if (b.dynamic) make_fresh(b.dynamic, b.dynamic_bytes);
  for (Warp& warp : b.warps) warp.returned = warp.arrived = 0;
  for (unsigned i = 0; i < b.size; ++i) {
    Lane& lane = b.lanes[i];
    lane.state = State::ready;
    lane.copies.clear();
    lane.batch = 0;
    lane.prepare(fiber_main, i);
  }
}

void select(unsigned rank) {
  block = &cluster.blocks[rank];
  block_index = block->index;
  race::select_block(rank);
}

// Runs the blocks of one cluster; the first has this number in the grid.
void run_cluster(size_t first, const std::vector<unsigned>& block_order,
                 const std::vector<unsigned>& warp_order, bool reversed) {
  cluster.at_barrier = 0;
  cluster.barriers = 0;
  race::begin_cluster(first);
  for (unsigned rank : block_order) {
    const size_t b = first + rank;
    cluster.blocks[rank].index = {static_cast<unsigned>(b % grid_dim.x),
                                  static_cast<unsigned>(b / grid_dim.x % grid_dim.y),
                                  static_cast<unsigned>(b / (size_t{grid_dim.x} * grid_dim.y))};
    begin_block(cluster.blocks[rank]);
  }
  for (bool all_returned = false; !all_returned;) {
    bool progress = false;
    all_returned = true;
    for (unsigned rank : block_order) {
      select(rank);
      for (unsigned w : warp_order) progress |= run_warp(w, reversed);
      all_returned &= block->returned == block->size;
    }
    if (!progress && !all_returned && !release_barriers()) throw Error(deadlock());
  }
  for (unsigned rank : block_order)
    if (const Block& b = cluster.blocks[rank]; b.mapped == cluster.barriers)
      throw Error("block " + text(b.index) +
                  " may have returned when a peer uses its shared memory, asked for at " +
                  simt::text(b.mapped_by) + ": no barrier of the cluster follows");
}

void set_up_stacks(unsigned threads) {
  if (cluster.size > blocks_with_stacks || threads > threads_with_stacks) {
    blocks_with_stacks = std::max(blocks_with_stacks, cluster.size);
    threads_with_stacks = std::max(threads_with_stacks, threads);
    stacks.reserve((blocks_with_stacks - 1) * kMaxThreads + threads_with_stacks);
  }
  for (unsigned b = 0; b < cluster.size; ++b) {
    std::vector<Lane>& lanes = cluster.blocks[b].lanes;
    if (lanes.size() < threads) lanes.resize(threads);
    for (unsigned i = 0; i < lanes.size(); ++i) lanes[i].set_stack(stacks[b * kMaxThreads + i]);
  }
}

void set_up_block(Block& b, unsigned rank, dim3 dim) {
  b.rank = rank;
  b.size = dim.x * dim.y * dim.z;
  b.warps.assign((b.size + 31) / 32, Warp{});
  for (unsigned i = 0; i < b.size; ++i) {
    Lane& lane = b.lanes[i];
    lane.index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
    lane.linear = i;
    lane.lane = i % 32;
    lane.warp = i / 32;
    b.warps[lane.warp].exists |= 1u << lane.lane;
  }
}

// In which order clusters, the blocks of a cluster, the warps of a block and the lanes of a warp take their turns.
struct Schedule {
  Schedule(size_t clusters_, size_t blocks_, size_t warps_)
      : clusters(clusters_), blocks(blocks_), warps(warps_) {
    const char* order = std::getenv("SIMT_ORDER");
    seed = order ? static_cast<unsigned>(std::atoi(order)) : 0;
    random.seed(seed);
    std::iota(clusters.begin(), clusters.end(), size_t{0});
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::iota(warps.begin(), warps.end(), 0u);
    reversed = seed == 1;
    if (reversed) {
      std::reverse(clusters.begin(), clusters.end());
      std::reverse(blocks.begin(), blocks.end());
      std::reverse(warps.begin(), warps.end());
    }
    if (seed > 1) std::shuffle(clusters.begin(), clusters.end(), random);
  }
  void next_cluster() {
    if (seed <= 1) return;
    std::shuffle(blocks.begin(), blocks.end(), random);
    std::shuffle(warps.begin(), warps.end(), random);
    reversed = random() & 1;
  }
  unsigned seed;
  std::mt19937 random;
  std::vector<size_t> clusters;
  std::vector<unsigned> blocks, warps;
  bool reversed;
};

void check_limits(dim3 grid, dim3 dim, size_t smem, unsigned in_cluster) {
  const uint64_t threads = uint64_t{dim.x} * dim.y * dim.z;
  if (!threads || threads > kMaxThreads || dim.z > 64)
    throw Error("a block of " + std::to_string(threads) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Error("a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                std::to_string(grid.z) + ") blocks");
  if (smem > kMaxDynamicShared) throw Error(std::to_string(smem) + " bytes of dynamic shared memory");
  if (!in_cluster || in_cluster > kMaxCluster || grid.x % in_cluster)
    throw Error("clusters of " + std::to_string(in_cluster) + " blocks in a grid of " +
                std::to_string(grid.x));
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && !std::strcmp(a.file_name(), b.file_name());
}

}  // namespace

void run(Body kernel, void* context, size_t context_bytes, dim3 grid, dim3 dim, size_t smem,
         unsigned in_cluster) {
  if (launching) throw Error("a launch from inside a kernel");
  check_limits(grid, dim, smem, in_cluster);
  std::lock_guard lock(launch_mutex);
  struct Launch {  // undone also when a kernel fails
    Launch(size_t bytes, unsigned blocks) {
      launching = true;
      cluster.size = blocks;
      for (unsigned b = 0; b < blocks; ++b) {
        cluster.blocks[b].dynamic_bytes = bytes;
        cluster.blocks[b].dynamic = bytes ? allocate(bytes, 16) : nullptr;
      }
    }
    ~Launch() {
      for (unsigned b = 0; b < cluster.size; ++b)
        std::free(std::exchange(cluster.blocks[b].dynamic, nullptr));
      current = nullptr;
      launching = false;
    }
  } launch(smem, in_cluster);
  set_up_stacks(dim.x * dim.y * dim.z);
  race::begin_launch(in_cluster);
  race::ignore(kMaxCluster, context, context_bytes);
  for (unsigned b = 0; b < in_cluster; ++b) {
    set_up_block(cluster.blocks[b], b, dim);
    race::ignore(b, cluster.blocks[b].lanes.data(), cluster.blocks[b].lanes.size() * sizeof(Lane));
  }
  block_dim = dim;
  grid_dim = grid;
  body = kernel;
  body_context = context;
  Schedule schedule(size_t{grid.x} * grid.y * grid.z / in_cluster, in_cluster,
                    cluster.blocks[0].warps.size());
  for (size_t c : schedule.clusters) {
    schedule.next_cluster();
    run_cluster(c * in_cluster, schedule.blocks, schedule.warps, schedule.reversed);
  }
}

std::string text(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void fail(const std::string& what) {
  if (!in_fiber) throw Error(what);
  Lane& me = self();
  block->error = "block " + text(block_index) + " thread " + std::to_string(me.linear) + " (warp " +
                 std::to_string(me.warp) + ", lane " + std::to_string(me.lane) + "): " + what;
  me.leave(Fiber::abandoned);
  __builtin_trap();
}

int sync_block(bool predicate, Where where) {
  Lane& me = self();
  if (block->at_barrier && !same_place(block->barrier, where))
    fail("the block diverged: __syncthreads at " + text(where) + " here, at " + text(block->barrier) +
         " in other threads");
  block->barrier = me.where = where;
  block->predicates += predicate;
  ++block->at_barrier;
  me.state = State::at_barrier;
  me.leave(Fiber::paused);
  return block->barrier_count;
}

unsigned cluster_rank() { return block->rank; }
unsigned cluster_size() { return cluster.size; }

void cluster_sync(Where where) {
  Lane& me = self();
  if (cluster.at_barrier && !same_place(cluster.barrier, where))
    fail("the cluster diverged: cluster_sync at " + text(where) + " here, at " + text(cluster.barrier) +
         " in other threads");
  cluster.barrier = me.where = where;
  ++cluster.at_barrier;
  me.state = State::at_cluster_barrier;
  me.leave(Fiber::paused);
}

void* map_shared(void* mine, unsigned rank, Where where) {
  // The race checker takes strings that are made in a fiber for a kernel's memory: only those of an error are.
  const auto at = [&] { return ", at " + text(where); };
  if (rank >= cluster.size)
    fail("rank " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster.size) + " blocks" +
         at());
  if (rank == block->rank) return mine;
  Block& peer = cluster.blocks[rank];
  const auto fail_for = [&](const char* what) {
    fail("shared memory of block " + text(peer.index) + ", " + what + at());
  };
  if (cluster.barriers == 0) fail_for("which may not have started: no barrier of the cluster precedes");
  if (peer.returned) fail_for("of which threads have returned");
  peer.mapped = cluster.barriers;
  peer.mapped_by = where;
  const auto offset_in = [&](const void* memory, size_t bytes) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(mine) - reinterpret_cast<uintptr_t>(memory);
    return memory && offset < bytes ? static_cast<ptrdiff_t>(offset) : -1;
  };
  if (const ptrdiff_t offset = offset_in(block->dynamic, block->dynamic_bytes); offset >= 0)
    return static_cast<char*>(peer.dynamic) + offset;
  for (SharedArray* array : block->arrays)
    if (const ptrdiff_t offset = offset_in(array->memory[block->rank], array->bytes); offset >= 0)
      return static_cast<char*>(array->of(peer)) + offset;
  fail_for("by an address that is not in this block's");
  return nullptr;
}

int max_clusters() {
  const char* wish = std::getenv("SIMT_CLUSTERS");
  return wish ? std::atoi(wish) : 2;
}

void* SharedArray::get() { return of(*block); }

void* SharedArray::of(Block& b) {
  void*& mine = memory[b.rank];
  if (!mine) mine = allocate(bytes, align);
  if (block_serial[b.rank] != b.serial) {
    block_serial[b.rank] = b.serial;
    b.static_bytes += bytes;
    if (b.static_bytes > kMaxStaticShared) fail("more than 48 KiB of static shared memory");
    b.arrays.push_back(this);
    make_fresh(mine, bytes);
  }
  return mine;
}

void* dynamic_shared(size_t align) {
  if (!block->dynamic) fail("dynamic shared memory is used, but the launch gave none");
  if (align > 16) fail("dynamic shared memory is only 16-byte aligned");
  return block->dynamic;
}

void async_copy(void* to, const void* from, size_t bytes, size_t zero_fill) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || zero_fill > bytes || addresses % bytes)
    fail("size or alignment of an asynchronous copy");
  std::memset(to, 0xff, bytes);
  race::was_read(from, bytes - zero_fill, __builtin_return_address(0));
  self().copies.push_back({to, from, bytes, zero_fill, self().batch});
}

void async_commit() { ++self().batch; }

void async_wait(size_t batches_left) {
  Lane& me = self();
  std::erase_if(me.copies, [&](const AsyncCopy& c) {
    if (c.batch + batches_left >= me.batch) return false;
    std::memcpy(c.to, c.from, c.bytes - c.zero_fill);
    std::memset(static_cast<char*>(c.to) + c.bytes - c.zero_fill, 0, c.zero_fill);
    race::wrote(c.to, c.bytes, __builtin_return_address(0));
    return true;
  });
}

void coherent_begin(Coherent kind, const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a misaligned atomic access");
  race::coherent(kind == Coherent::update, p, bytes, __builtin_return_address(0));
}
void coherent_end() { race::coherent_done(); }

}  // namespace simt
