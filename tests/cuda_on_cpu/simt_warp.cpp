// Warp collectives: a lane arrives, and the last one of those that its mask names does the work for all.
#include <algorithm>
#include <bit>

#include "simt_race.h"
#include "simt_state.h"

namespace simt {
namespace {

const char* const kNames[] = {
    "__shfl_sync",       "__ballot_sync",     "__any_sync",        "__all_sync",        "__match_any_sync",
    "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_min_sync", "__reduce_max_sync",
    "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync", "__syncwarp"};

std::string hex(unsigned v) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", v);
  return digits;
}
std::string call(const Lane& lane) {
  return std::string(kNames[static_cast<int>(lane.op)]) + "(" + hex(lane.mask) + ") at " + text(lane.where);
}

template <class F>
void for_each_lane(unsigned mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

unsigned word(const Lane& lane) {
  unsigned v;
  std::memcpy(&v, lane.brought, sizeof v);
  return v;
}

void give(Lane* lanes, unsigned mask, unsigned value) {
  for_each_lane(mask, [&](int l) { std::memcpy(lanes[l].result, &value, sizeof value); });
}

template <class F>
void reduce(Lane* lanes, unsigned mask, F f) {
  const int first = std::countr_zero(mask);
  unsigned total = word(lanes[first]);
  for_each_lane(mask & (mask - 1), [&](int l) { total = f(total, word(lanes[l])); });
  give(lanes, mask, total);
}

void shuffle(Lane* lanes, unsigned mask) {
  for_each_lane(mask, [&](int l) {
    Lane& lane = lanes[l];
    if (!(mask >> lane.source & 1))
      fail(call(lane) + ": lane " + std::to_string(l) + " reads lane " + std::to_string(lane.source) +
           ", which is not taking part");
    std::memcpy(lane.result, lanes[lane.source].brought, sizeof lane.result);
  });
}

// Lanes whose word equals that of lane `l`.
unsigned matching(const Lane* lanes, unsigned mask, unsigned value) {
  unsigned same = 0;
  for_each_lane(mask, [&](int l) { same |= static_cast<unsigned>(word(lanes[l]) == value) << l; });
  return same;
}

void perform(Op op, Lane* lanes, unsigned mask) {
  const auto as_signed = [](auto f) {
    return [f](unsigned a, unsigned b) {
      return static_cast<unsigned>(f(static_cast<int>(a), static_cast<int>(b)));
    };
  };
  const auto smaller = [](auto a, auto b) { return std::min(a, b); };
  const auto larger = [](auto a, auto b) { return std::max(a, b); };
  switch (op) {
    case Op::shuffle:
      return shuffle(lanes, mask);
    case Op::ballot:
      return give(lanes, mask, mask & ~matching(lanes, mask, 0));
    case Op::any:
      return give(lanes, mask, matching(lanes, mask, 0) != mask);
    case Op::all:
      return give(lanes, mask, matching(lanes, mask, 0) == 0);
    case Op::match_any:
      return for_each_lane(mask, [&](int l) {
        const unsigned same = matching(lanes, mask, word(lanes[l]));
        std::memcpy(lanes[l].result, &same, sizeof same);
      });
    case Op::add:
      return reduce(lanes, mask, [](unsigned a, unsigned b) { return a + b; });
    case Op::min_unsigned:
      return reduce(lanes, mask, smaller);
    case Op::max_unsigned:
      return reduce(lanes, mask, larger);
    case Op::min_signed:
      return reduce(lanes, mask, as_signed(smaller));
    case Op::max_signed:
      return reduce(lanes, mask, as_signed(larger));
    case Op::bit_and:
      return reduce(lanes, mask, [](unsigned a, unsigned b) { return a & b; });
    case Op::bit_or:
      return reduce(lanes, mask, [](unsigned a, unsigned b) { return a | b; });
    case Op::bit_xor:
      return reduce(lanes, mask, [](unsigned a, unsigned b) { return a ^ b; });
    case Op::syncwarp:
      return race::warp_barrier(lanes->warp);
  }
}

}  // namespace

std::string describe(const Lane& lane) {
  if (lane.state == State::returned) return "returned";
  const char* const barrier = lane.state == State::at_barrier           ? "__syncthreads"
                              : lane.state == State::at_cluster_barrier ? "cluster_sync"
                                                                        : nullptr;
  return "wait at " + (barrier ? barrier + (" at " + text(lane.where)) : call(lane));
}

bool try_complete(Lane& lane) {
  Warp& warp = block->warps[lane.warp];
  Lane* lanes = lanes_of(lane.warp);
  const unsigned mask = lane.mask;
  if (const unsigned gone = mask & (~warp.exists | warp.returned))
    fail(call(lane) + " by warp " + std::to_string(lane.warp) +
         " names lanes that have returned or do not exist: " + hex(gone));
  if (mask & ~warp.arrived) return false;
  for_each_lane(mask, [&](int l) {
    const Lane& other = lanes[l];
    if (other.op != lane.op || other.mask != mask || other.bytes != lane.bytes)
      fail("lanes of warp " + std::to_string(lane.warp) + " meet at different collectives: lane " +
           std::to_string(lane.lane) + " at " + call(lane) + ", lane " + std::to_string(l) + " at " +
           call(other));
  });
  perform(lane.op, lanes, mask);
  warp.arrived &= ~mask;
  for_each_lane(mask, [&](int l) { lanes[l].state = State::ready; });
  return true;
}

void check_departure(const Lane& gone) {
  Lane* lanes = lanes_of(gone.warp);
  for_each_lane(block->warps[gone.warp].arrived, [&](int l) {
    if (lanes[l].mask >> gone.lane & 1) try_complete(lanes[l]);
  });
}

void collective(Op op, unsigned mask, const void* value, size_t bytes, int source, void* result,
                Where where) {
  Lane& me = self();
  me.op = op;
  me.mask = mask;
  me.bytes = bytes;
  me.source = source;
  me.where = where;
  if (!(mask >> me.lane & 1)) fail(call(me) + ": the caller is not in its mask");
  std::memcpy(me.brought, value, bytes);
  block->warps[me.warp].arrived |= 1u << me.lane;
  if (!try_complete(me)) {
    me.state = State::at_collective;
    me.leave(Fiber::paused);
  }
  std::memcpy(result, me.result, bytes);
}

}  // namespace simt
