// Barriers and warp collectives, as kernels call them. Included by simt.h.
#pragma once
#include "simt.h"

namespace simt {

using Where = std::source_location;  // for messages, and to tell one barrier from another

enum class Op : uint8_t {
  shuffle,
  ballot,
  any,
  all,
  match_any,
  add,
  min_unsigned,
  max_unsigned,
  min_signed,
  max_signed,
  bit_and,
  bit_or,
  bit_xor,
  syncwarp
};

// Waits for the whole block; gives the number of threads whose `predicate` holds.
int sync_block(bool predicate, Where where);
// Waits for the lanes in `mask` to bring `bytes` (at most 8) at `value`. A shuffle reads lane `source`.
void collective(Op op, unsigned mask, const void* value, size_t bytes, int source, void* result, Where where);

template <class R, class T>
R vote(Op op, unsigned mask, T value, Where where) {
  static_assert(sizeof(R) == 4 && sizeof(T) == 4);
  R result;
  collective(op, mask, &value, sizeof value, 0, &result, where);
  return result;
}

enum class Shuffle { index, up, down, exclusive_or };

inline int shuffle_source(Shuffle kind, int argument, int width) {
  const int lane = static_cast<int>(current->lane), base = lane & ~(width - 1), end = base + width;
  switch (kind) {
    case Shuffle::index:
      return base | (argument & (width - 1));
    case Shuffle::up:
      return lane - argument < base ? lane : lane - argument;
    case Shuffle::down:
      return lane + argument >= end ? lane : lane + argument;
    default:
      return (lane ^ argument) >= end ? lane : lane ^ argument;
  }
}

template <class T>
T shuffle(Shuffle kind, unsigned mask, T value, int argument, int width, Where where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "shuffle of this type");
  if (width < 1 || width > 32 || (width & (width - 1))) fail("shuffle of width " + std::to_string(width));
  T result;
  collective(Op::shuffle, mask, &value, sizeof(T), shuffle_source(kind, argument, width), &result, where);
  return result;
}

}  // namespace simt

#define SIMT_WHERE simt::Where where = simt::Where::current()

inline void __syncthreads(SIMT_WHERE) { simt::sync_block(false, where); }
inline int __syncthreads_count(int p, SIMT_WHERE) { return simt::sync_block(p != 0, where); }
inline int __syncthreads_or(int p, SIMT_WHERE) { return simt::sync_block(p != 0, where) != 0; }
inline int __syncthreads_and(int p, SIMT_WHERE) { return simt::sync_block(p == 0, where) == 0; }

inline void __syncwarp(unsigned mask = ~0u, SIMT_WHERE) {
  simt::vote<int>(simt::Op::syncwarp, mask, 0, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_WHERE) {
  return simt::shuffle(simt::Shuffle::index, mask, value, lane, width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_WHERE) {
  return simt::shuffle(simt::Shuffle::up, mask, value, static_cast<int>(delta), width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_WHERE) {
  return simt::shuffle(simt::Shuffle::down, mask, value, static_cast<int>(delta), width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_WHERE) {
  return simt::shuffle(simt::Shuffle::exclusive_or, mask, value, lanes, width, where);
}

#define SIMT_VOTE(name, R, T, op)                           \
  inline R name(unsigned mask, T value, SIMT_WHERE) {       \
    return simt::vote<R>(simt::Op::op, mask, value, where); \
  }
SIMT_VOTE(__ballot_sync, unsigned, int, ballot)
SIMT_VOTE(__any_sync, int, int, any)
SIMT_VOTE(__all_sync, int, int, all)
SIMT_VOTE(__match_any_sync, unsigned, unsigned, match_any)
SIMT_VOTE(__reduce_add_sync, unsigned, unsigned, add)
SIMT_VOTE(__reduce_add_sync, int, int, add)
SIMT_VOTE(__reduce_min_sync, unsigned, unsigned, min_unsigned)
SIMT_VOTE(__reduce_min_sync, int, int, min_signed)
SIMT_VOTE(__reduce_max_sync, unsigned, unsigned, max_unsigned)
SIMT_VOTE(__reduce_max_sync, int, int, max_signed)
SIMT_VOTE(__reduce_and_sync, unsigned, unsigned, bit_and)
SIMT_VOTE(__reduce_or_sync, unsigned, unsigned, bit_or)
SIMT_VOTE(__reduce_xor_sync, unsigned, unsigned, bit_xor)
#undef SIMT_VOTE
#undef SIMT_WHERE
