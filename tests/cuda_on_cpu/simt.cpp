// The scheduler: steps the fibers of a block, warp by warp, until all have returned or wait for each other.
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
Block block;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxStaticShared = 48 << 10, kMaxDynamicShared = 227 << 10;

std::mutex launch_mutex;
thread_local bool launching = false;
Stacks stacks;
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
  ++block.returned;
  block.warps[me.warp].returned |= 1u << me.lane;
  me.leave(Fiber::finished);
  __builtin_trap();
}

void step(Lane& lane) {
  current = &lane;
  block.in_fiber = true;
  lane.enter();
  block.in_fiber = false;
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

std::string deadlock() {
  std::map<std::string, std::pair<unsigned, unsigned>> groups;  // what they wait for: how many, the first
  for (unsigned i = 0; i < block.size; ++i) {
    auto& [count, first] = groups[describe(block.lanes[i])];
    if (!count++) first = i;
  }
  std::string s = "deadlock:";
  for (const auto& [what, who] : groups)
    s += " " + std::to_string(who.first) + " thread(s) " + what + " (first: " + std::to_string(who.second) +
         ");";
  return s;
}

void release_barrier() {
  block.barrier_count = static_cast<int>(std::exchange(block.predicates, 0));
  block.at_barrier = 0;
  for (unsigned i = 0; i < block.size; ++i) block.lanes[i].state = State::ready;
  race::block_barrier();
}

// Steps the lanes of one warp until none can go on; false if none could from the start.
bool run_warp(unsigned w, bool reversed) {
  const unsigned low = w * 32, high = std::min(low + 32, block.size);
  bool progress = false;
  for (bool more = true; more;) {
    more = false;
    for (unsigned k = low; k < high; ++k) {
      Lane& lane = block.lanes[reversed ? high - 1 - (k - low) : k];
      if (lane.state != State::ready) continue;
      step(lane);
      if (!block.error.empty()) throw Error(block.error);
      if (lane.state == State::returned) check_departure(lane);
      more = progress = true;
    }
  }
  return progress;
}

void run_block(const std::vector<unsigned>& warp_order, bool reversed) {
  block.at_barrier = block.returned = block.predicates = 0;
  block.static_bytes = 0;
  ++block.serial;
  if (block.dynamic) make_fresh(block.dynamic, block.dynamic_bytes);
  for (Warp& warp : block.warps) warp.returned = warp.arrived = 0;
  for (unsigned i = 0; i < block.size; ++i) {
    Lane& lane = block.lanes[i];
    lane.state = State::ready;
    lane.copies.clear();
    lane.batch = 0;
    lane.prepare(fiber_main, i);
  }
  while (block.returned < block.size) {
    bool progress = false;
    for (unsigned w : warp_order) progress |= run_warp(w, reversed);
    if (progress) continue;
    if (block.at_barrier < block.size) throw Error(deadlock());
    release_barrier();
  }
}

void set_up_block(dim3 dim) {
  block.size = dim.x * dim.y * dim.z;
  if (block.size > block.lanes.size()) {
    stacks.reserve(block.size);
    block.lanes.resize(block.size);
    for (unsigned i = 0; i < block.size; ++i) block.lanes[i].set_stack(stacks[i]);
  }
  block.warps.assign((block.size + 31) / 32, Warp{});
  for (unsigned i = 0; i < block.size; ++i) {
    Lane& lane = block.lanes[i];
    lane.index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
    lane.linear = i;
    lane.lane = i % 32;
    lane.warp = i / 32;
    block.warps[lane.warp].exists |= 1u << lane.lane;
  }
}

// In which order blocks, the warps of a block and the lanes of a warp take their turns.
struct Schedule {
  explicit Schedule(size_t blocks_, size_t warps_) : blocks(blocks_), warps(warps_) {
    const char* order = std::getenv("SIMT_ORDER");
    seed = order ? static_cast<unsigned>(std::atoi(order)) : 0;
    random.seed(seed);
    std::iota(blocks.begin(), blocks.end(), size_t{0});
    std::iota(warps.begin(), warps.end(), 0u);
    reversed = seed == 1;
    if (seed == 1) std::reverse(blocks.begin(), blocks.end()), std::reverse(warps.begin(), warps.end());
    if (seed > 1) std::shuffle(blocks.begin(), blocks.end(), random);
  }
  void next_block() {
    if (seed <= 1) return;
    std::shuffle(warps.begin(), warps.end(), random);
    reversed = random() & 1;
  }
  unsigned seed;
  std::mt19937 random;
  std::vector<size_t> blocks;
  std::vector<unsigned> warps;
  bool reversed;
};

void check_limits(dim3 grid, dim3 dim, size_t smem) {
  const uint64_t threads = uint64_t{dim.x} * dim.y * dim.z;
  if (!threads || threads > kMaxThreads || dim.z > 64)
    throw Error("a block of " + std::to_string(threads) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Error("a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                std::to_string(grid.z) + ") blocks");
  if (smem > kMaxDynamicShared) throw Error(std::to_string(smem) + " bytes of dynamic shared memory");
}

}  // namespace

void run(Body kernel, void* context, size_t context_bytes, dim3 grid, dim3 dim, size_t smem) {
  if (launching) throw Error("a launch from inside a kernel");
  check_limits(grid, dim, smem);
  std::lock_guard lock(launch_mutex);
  struct Launch {  // undone also when a kernel fails
    explicit Launch(size_t bytes) {
      launching = true;
      block.dynamic_bytes = bytes;
      block.dynamic = bytes ? allocate(bytes, 16) : nullptr;
      block.error.clear();
    }
    ~Launch() {
      std::free(block.dynamic);
      current = nullptr;
      launching = false;
    }
  } launch(smem);
  set_up_block(dim);
  block_dim = dim;
  grid_dim = grid;
  body = kernel;
  body_context = context;
  Schedule schedule(size_t{grid.x} * grid.y * grid.z, block.warps.size());
  race::begin_launch();
  race::ignore(0, block.lanes.data(), block.lanes.size() * sizeof(Lane));
  race::ignore(1, context, context_bytes);
  for (size_t b : schedule.blocks) {
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / (size_t{grid.x} * grid.y))};
    schedule.next_block();
    race::begin_block(b);
    run_block(schedule.warps, schedule.reversed);
  }
}

std::string text(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void fail(const std::string& what) {
  if (!block.in_fiber) throw Error(what);
  Lane& me = self();
  block.error = "block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ", " +
                std::to_string(block_index.z) + ") thread " + std::to_string(me.linear) + " (warp " +
                std::to_string(me.warp) + ", lane " + std::to_string(me.lane) + "): " + what;
  me.leave(Fiber::abandoned);
  __builtin_trap();
}

int sync_block(bool predicate, Where where) {
  Lane& me = self();
  if (block.at_barrier &&
      (block.barrier.line() != where.line() || std::strcmp(block.barrier.file_name(), where.file_name())))
    fail("the block diverged: __syncthreads at " + text(where) + " here, at " + text(block.barrier) +
         " in other threads");
  block.barrier = me.where = where;
  block.predicates += predicate;
  ++block.at_barrier;
  me.state = State::at_barrier;
  me.leave(Fiber::paused);
  return block.barrier_count;
}

void* SharedArray::get() {
  if (!memory) memory = allocate(bytes, align);
  if (block_serial != block.serial) {
    block_serial = block.serial;
    block.static_bytes += bytes;
    if (block.static_bytes > kMaxStaticShared) fail("more than 48 KiB of static shared memory");
    make_fresh(memory, bytes);
  }
  return memory;
}

void* dynamic_shared(size_t align) {
  if (!block.dynamic) fail("dynamic shared memory is used, but the launch gave none");
  if (align > 16) fail("dynamic shared memory is only 16-byte aligned");
  return block.dynamic;
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
