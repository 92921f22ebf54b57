// A pool of large output buffers whose pages are mapped already. A fresh page costs a page fault and
// clearing, together more than the kernel that fills it; a released buffer serves the next request of about
// its size. A tensor on such a buffer cannot be resized: the stable ABI has no storage with both a deleter of
// ours and torch's allocator. With a limit of 0 there is no pool.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../math/visibility.h"

namespace fastloss::cpu {

inline constexpr size_t kPoolMinimum = size_t{1} << 20;  // smaller requests are better served by malloc

struct PoolStatistics {
  int64_t in_use, cached, peak_in_use, limit;  // bytes
  int64_t hits, misses;                        // requests served from the pool, and from the system
};

// A buffer of at least `bytes`, aligned to a huge page; contents undefined. Throws std::bad_alloc.
void* pool_acquire(size_t bytes);
// Gives back a buffer from pool_acquire: kept while the cached bytes stay within the limit, the oldest
// unmapped first. Safe from any thread, after a fork, and while the interpreter shuts down.
void pool_release(void* p);
// Whether the limit is not 0.
bool pool_enabled();
// Asks the system to back fresh memory by huge pages: of the pool's benefit, the fewer page faults.
void prefer_huge_pages(void* p, size_t bytes);
FASTLOSS_EXPORT void pool_empty();
FASTLOSS_EXPORT void pool_set_limit(int64_t bytes);
FASTLOSS_EXPORT PoolStatistics pool_statistics();
// Starts to watch the bytes in use; the highest number since then, beyond what it was at the start.
FASTLOSS_EXPORT void pool_watch();
FASTLOSS_EXPORT int64_t pool_watched();

}  // namespace fastloss::cpu
