#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

namespace fastloss::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  void* p;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::list<Block> cached;                   // oldest first
  std::unordered_map<void*, size_t> in_use;  // size of each buffer that is out
  PoolStatistics statistics{};
  int64_t watch_start = 0, watch_peak = 0;  // of pool_watch

  Pool() {
    const int64_t memory = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
    statistics.limit = memory / 4;
  }
  void unmap(const Block& b) {
    munmap(b.p, b.bytes);
    statistics.cached -= static_cast<int64_t>(b.bytes);
  }
  void shrink_to(int64_t bytes) {
    while (statistics.cached > bytes) {
      unmap(cached.front());
      cached.pop_front();
    }
  }
};

Pool& pool() {
  static Pool* const p = [] {  // never destroyed: tensors may outlive every static object
    Pool* made = new Pool;
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] {  // a child would copy every cached page at its first write: it starts without them
                     pool().shrink_to(0);
                     pool().mutex.unlock();
                   });
    return made;
  }();
  return *p;
}

// Address space aligned to a huge page, so that the kernel may back all of it by huge pages.
void* map(size_t bytes) {
  void* raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > begin) munmap(raw, aligned - begin);
  const size_t tail = begin + kHugePage - aligned;
  if (tail) munmap(reinterpret_cast<void*>(aligned + bytes), tail);
  madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);
  return reinterpret_cast<void*>(aligned);
}

}  // namespace

void* pool_acquire(size_t bytes) {
  bytes = (std::max<size_t>(bytes, 1) + kHugePage - 1) / kHugePage * kHugePage;
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  auto best = p.cached.end();
  for (auto it = p.cached.begin(); it != p.cached.end(); ++it)
    if (it->bytes >= bytes && it->bytes <= bytes + bytes / 4 &&
        (best == p.cached.end() || it->bytes < best->bytes))
      best = it;
  Block b{nullptr, bytes};
  if (best != p.cached.end()) {
    b = *best;
    p.cached.erase(best);
    p.statistics.cached -= static_cast<int64_t>(b.bytes);
    ++p.statistics.hits;
  } else {
    b.p = map(bytes);
    if (!b.p) {  // memory is short: what is cached goes first
      p.shrink_to(0);
      b.p = map(bytes);
    }
    if (!b.p) throw std::bad_alloc();
    ++p.statistics.misses;
  }
  p.in_use.emplace(b.p, b.bytes);
  p.statistics.in_use += static_cast<int64_t>(b.bytes);
  p.statistics.peak_in_use = std::max(p.statistics.peak_in_use, p.statistics.in_use);
  p.watch_peak = std::max(p.watch_peak, p.statistics.in_use);
  return b.p;
}

void pool_release(void* ptr) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  const auto it = p.in_use.find(ptr);
  if (it == p.in_use.end()) return;
  const Block b{ptr, it->second};
  p.in_use.erase(it);
  p.statistics.in_use -= static_cast<int64_t>(b.bytes);
  p.cached.push_back(b);
  p.statistics.cached += static_cast<int64_t>(b.bytes);
  p.shrink_to(p.statistics.limit);
}

bool pool_enabled() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  return p.statistics.limit > 0;
}

void prefer_huge_pages(void* p, size_t bytes) {
  const auto begin = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

void pool_empty() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  p.shrink_to(0);
}

void pool_set_limit(int64_t bytes) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  p.statistics.limit = std::max<int64_t>(bytes, 0);
  p.shrink_to(p.statistics.limit);
}

PoolStatistics pool_statistics() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  return p.statistics;
}

void pool_watch() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  p.watch_start = p.watch_peak = p.statistics.in_use;
}

int64_t pool_watched() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  return p.watch_peak - p.watch_start;
}

}  // namespace fastloss::cpu
