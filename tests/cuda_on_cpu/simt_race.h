// Hooks of the checker of data races, uninitialised shared memory and alignment (simt_race.cpp). Without
// SIMT_RACE they are empty.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt::race {

// Accesses count while a fiber runs kernel code, and not those to its own stack. Of this host thread alone:
// what the others run meanwhile is no kernel.
inline constinit thread_local bool in_kernel __attribute__((tls_model("initial-exec"))) = false;
inline char *stack_low = nullptr, *stack_high = nullptr;

#if defined(SIMT_RACE)
void begin_launch(unsigned blocks_in_cluster);
void ignore(unsigned which, const void* p, size_t bytes);  // which: at most kMaxCluster
void begin_cluster(uint64_t first_block);
void select_block(unsigned rank);  // whose threads are stepped from now on
void block_barrier(unsigned rank);
void cluster_barrier();
void warp_barrier(unsigned warp);
void fresh_shared(void* p, size_t bytes);  // a block's shared array, not written yet
void coherent(bool update, const void* p, size_t bytes, void* pc);
void coherent_done();
void wrote(void* p, size_t bytes, void* pc);
void was_read(const void* p, size_t bytes, void* pc);
#else
inline void begin_launch(unsigned) {}
inline void ignore(unsigned, const void*, size_t) {}
inline void begin_cluster(uint64_t) {}
inline void select_block(unsigned) {}
inline void block_barrier(unsigned) {}
inline void cluster_barrier() {}
inline void warp_barrier(unsigned) {}
inline void fresh_shared(void*, size_t) {}
inline void coherent(bool, const void*, size_t, void*) {}
inline void coherent_done() {}
inline void wrote(void*, size_t, void*) {}
inline void was_read(const void*, size_t, void*) {}
#endif

}  // namespace simt::race
