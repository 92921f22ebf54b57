// The runtime behind g++ -fsanitize=thread, replaced: exact checks, byte by byte, of data races among CUDA
// threads (ordered by __syncthreads, __syncwarp, the barrier of a cluster and the end of a launch, nothing
// else), of reads of shared memory that nobody wrote, and of alignment. Compiled without -fsanitize=thread itself.
#include "simt_race.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <unordered_map>

#include "simt_state.h"

namespace simt::race {
namespace {

// An atomic or __stcg is an update; __ldcg a coherent load.
enum Kind { kRead, kWrite, kUpdate, kCoherentLoad, kKinds };
const char* const kNames[] = {"read", "write", "update", "coherent load"};

bool can_conflict(Kind a, Kind b) {
  if (a == kWrite || b == kWrite) return true;
  return (a == kUpdate && b == kRead) || (a == kRead && b == kUpdate);
}

// The accesses of one kind to one byte since the last barrier that orders them: what later ones must know.
struct Accesses {
  enum : uint8_t { kLanes = 1, kWarps = 2, kBlocks = 4, kClusters = 8 };
  uint32_t block, cluster_epoch, block_epoch, warp_epoch;
  uint16_t thread;
  uint8_t several;  // by more than one of these
  bool any;
};
struct Byte {
  uint32_t launch;
  bool shared;
  Accesses by[kKinds];
};

constexpr uintptr_t kPage = 4096;
constexpr size_t kMostPages = 1024;  // 370 MB of what is known about 4 MB
std::unordered_map<uintptr_t, Byte*> pages;
uintptr_t last_page = ~uintptr_t{0};
Byte* last_bytes;

uint32_t launch, blocks_in_cluster, first_block, cluster_epoch;
// What the barriers of a block and of its warps have ordered; `at` is of the block that is stepped.
struct Epochs {
  uint32_t block, block_epoch, warp_epoch[32];
} epochs[kMaxCluster], *at = epochs;
bool coherent_access;
struct {
  uintptr_t from, bytes;
} ignored[kMaxCluster + 1];

Byte& byte_at(uintptr_t address) {
  const uintptr_t page = address / kPage;
  if (page != last_page) {
    Byte*& bytes = pages[page];
    if (!bytes) bytes = static_cast<Byte*>(std::calloc(kPage, sizeof(Byte)));
    last_page = page;
    last_bytes = bytes;
  }
  return last_bytes[address % kPage];
}

bool unordered(const Accesses& a) {
  if (!a.any) return false;
  if ((a.several & Accesses::kClusters) || a.block - first_block >= blocks_in_cluster) return true;
  if (a.cluster_epoch != cluster_epoch) return false;
  if ((a.several & Accesses::kBlocks) || a.block != at->block) return true;
  if (a.block_epoch != at->block_epoch) return false;
  if (a.several & Accesses::kWarps) return true;
  if (a.thread / 32u == current->warp && a.warp_epoch != at->warp_epoch[current->warp]) return false;
  return (a.several & Accesses::kLanes) || a.thread != current->linear;
}

void record(Accesses& a) {
  const Accesses now{at->block,
                     cluster_epoch,
                     at->block_epoch,
                     at->warp_epoch[current->warp],
                     static_cast<uint16_t>(current->linear),
                     0,
                     true};
  const auto replace = [&](int keep) {
    const uint8_t several = a.several & keep;
    a = now;
    a.several = several;
  };
  if (!a.any) {
    a = now;
  } else if (a.block - first_block >= blocks_in_cluster) {
    a.several |= Accesses::kClusters;
  } else if (a.cluster_epoch != now.cluster_epoch) {
    replace(Accesses::kClusters);
  } else if (a.block != now.block) {
    a.several |= Accesses::kBlocks;
  } else if (a.block_epoch != now.block_epoch) {
    replace(Accesses::kClusters | Accesses::kBlocks);
  } else if (a.thread / 32 != now.thread / 32) {
    a.several |= Accesses::kWarps;
  } else if (a.warp_epoch != now.warp_epoch) {
    replace(Accesses::kClusters | Accesses::kBlocks | Accesses::kWarps);
  } else if (a.thread != now.thread) {
    a.several |= Accesses::kLanes;
  }
}

// The source lines of an address: the innermost inlined function first.
std::string source_of(void* pc) {
  Dl_info library;
  if (!dladdr(pc, &library) || !library.dli_fname) return "an unknown place";
  char command[600], line[300];
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%zx 2>/dev/null", library.dli_fname,
                static_cast<size_t>(static_cast<char*>(pc) - 1 - static_cast<char*>(library.dli_fbase)));
  std::string lines;
  if (FILE* out = popen(command, "r")) {
    while (std::fgets(line, sizeof line, out)) {
      const std::string s = line;
      lines += (lines.empty() ? "" : " < ") + s.substr(0, s.find_first_of(" \n"));
    }
    pclose(out);
  }
  return lines.empty() ? "an unknown place" : lines;
}

// Records the access; gives what it must not meet, or kFine.
enum Finding { kRaceWithFirst = 0, kFine = kKinds, kNobodyWrote };
int check_byte(Byte& b, Kind kind) {
  if (b.launch != launch) b = Byte{launch, false, {}};
  for (int k = 0; k < kKinds; ++k)
    if (can_conflict(kind, static_cast<Kind>(k)) && unordered(b.by[k])) return kRaceWithFirst + k;
  if (kind == kRead && b.shared && !b.by[kWrite].any && !b.by[kUpdate].any) return kNobodyWrote;
  record(b.by[kind]);
  return kFine;
}

std::string explain(int finding, const Byte& b, Kind kind, size_t bytes) {
  if (finding == kNobodyWrote) return "read of shared memory that nobody wrote";
  const Accesses& other = b.by[finding - kRaceWithFirst];
  return std::string("data race on ") + (b.shared ? "shared" : "global") + " memory: " + kNames[kind] +
         " of " + std::to_string(bytes) + " bytes against a " + kNames[finding - kRaceWithFirst] +
         " by block " + std::to_string(other.block) + " thread " + std::to_string(other.thread);
}

void access(const void* p, size_t bytes, Kind kind, void* pc, size_t align) {
  if (!in_kernel || coherent_access) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (p >= stack_low && p < stack_high) return;
  for (const auto& range : ignored)
    if (address - range.from < range.bytes) return;
  in_kernel = false;
  std::string error;
  if (align > 1 && address % align) error = "misaligned " + std::to_string(bytes) + "-byte " + kNames[kind];
  for (size_t i = 0; i < bytes && error.empty(); ++i) {
    Byte& b = byte_at(address + i);
    if (const int finding = check_byte(b, kind); finding != kFine) error = explain(finding, b, kind, bytes);
  }
  in_kernel = true;
  if (!error.empty()) fail(error + ", at " + source_of(pc));
}

}  // namespace

void ignore(unsigned which, const void* p, size_t bytes) {
  ignored[which] = {reinterpret_cast<uintptr_t>(p), bytes};
}
void begin_launch(unsigned in_cluster) {
  ++launch;
  blocks_in_cluster = in_cluster;
  for (auto& range : ignored) range = {};
  coherent_access = false;
  if (pages.size() < kMostPages) return;
  for (auto& [page, bytes] : pages) std::free(bytes);
  pages.clear();
  last_page = ~uintptr_t{0};
}
void begin_cluster(uint64_t first) {
  first_block = static_cast<uint32_t>(first);
  cluster_epoch = 0;
  for (uint32_t rank = 0; rank < blocks_in_cluster; ++rank) epochs[rank] = {first_block + rank, 0, {}};
}
void select_block(unsigned rank) { at = &epochs[rank]; }
void block_barrier(unsigned rank) { ++epochs[rank].block_epoch; }
void cluster_barrier() { ++cluster_epoch; }
void warp_barrier(unsigned warp) { ++at->warp_epoch[warp]; }
void fresh_shared(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) byte_at(reinterpret_cast<uintptr_t>(p) + i) = Byte{launch, true, {}};
}
void coherent(bool update, const void* p, size_t bytes, void* pc) {
  access(p, bytes, update ? kUpdate : kCoherentLoad, pc, bytes);
  coherent_access = true;
}
void coherent_done() { coherent_access = false; }
void wrote(void* p, size_t bytes, void* pc) { access(p, bytes, kWrite, pc, 1); }
void was_read(const void* p, size_t bytes, void* pc) { access(p, bytes, kRead, pc, 1); }

}  // namespace simt::race

// ---- what g++ calls for every load and store of instrumented code

extern "C" {

using simt::race::access;
using simt::race::kRead;
using simt::race::kWrite;

#define SIMT_ACCESS(n)                                                                              \
  void __tsan_read##n(void* p) { access(p, n, kRead, __builtin_return_address(0), n); }             \
  void __tsan_write##n(void* p) { access(p, n, kWrite, __builtin_return_address(0), n); }           \
  void __tsan_unaligned_read##n(void* p) { access(p, n, kRead, __builtin_return_address(0), 1); }   \
  void __tsan_unaligned_write##n(void* p) { access(p, n, kWrite, __builtin_return_address(0), 1); } \
  void __tsan_volatile_read##n(void* p) { access(p, n, kRead, __builtin_return_address(0), n); }    \
  void __tsan_volatile_write##n(void* p) { access(p, n, kWrite, __builtin_return_address(0), n); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)

void __tsan_read_range(void* p, size_t n) { access(p, n, kRead, __builtin_return_address(0), 1); }
void __tsan_write_range(void* p, size_t n) { access(p, n, kWrite, __builtin_return_address(0), 1); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) {
  return *p;
}  // guards of local statics
}
