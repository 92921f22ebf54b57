// Inclusive scans of rows that are longer than a block can hold: the tiles of a row are summed up, the sums
// scanned, and each tile scanned again from the sum before it. The order of the sums depends on the length of
// the row alone.
//
// An item is a struct of 8-byte words with an associative `then`; its default is the identity. `kReversed`:
// from the last place to the first. `Read` gives the item of a place, `Save` takes the scan's result there.
#pragma once
#include <cstring>

#include "../reduce.cuh"

namespace fastloss::cuda {

template <class Item>
__device__ __forceinline__ Item item_from_lane_below(const Item& s, int offset) {
  constexpr int kWords = sizeof(Item) / 8;
  unsigned long long words[kWords];
  std::memcpy(words, &s, sizeof s);
#pragma unroll
  for (int k = 0; k < kWords; ++k) words[k] = __shfl_up_sync(kFullMask, words[k], offset);
  Item below;
  std::memcpy(&below, words, sizeof s);
  return below;
}

// The items of the block's threads joined: in `before` those of the threads before this one; returns all.
template <int kThreads, class Item>
__device__ __forceinline__ Item scan_block(Item mine, Item& before) {
  FL_SHARED(Item, warps, kThreads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Item below = item_from_lane_below(mine, offset);
    if (lane >= offset) mine = below.then(mine);
  }
  Item lower = item_from_lane_below(mine, 1);
  if (lane == 0) lower = Item();
  __syncthreads();  // hazard: an earlier scan may still be read
  if (lane == 31) warps[warp] = mine;
  __syncthreads();
  Item all;
#pragma unroll 1
  for (int k = 0; k < kThreads / 32; ++k) {
    if (k == warp) before = all.then(lower);
    all = all.then(warps[k]);
  }
  return all;
}

template <class Item>
__device__ __forceinline__ int64_t scan_place(int64_t i, int64_t n) {
  return Item::kReversed ? n - 1 - i : i;
}

// A tile: kThreads threads with kSteps places each, this thread's from `first` on. Without `Save` only its
// sum.
template <class Item, int kThreads, int kSteps, class Read>
__device__ __forceinline__ Item sum_of_tile(int64_t first, int64_t n, const Read& read) {
  Item mine, before;
  for (int k = 0; k < kSteps && first + k < n; ++k) mine = mine.then(read(scan_place<Item>(first + k, n)));
  return scan_block<kThreads>(mine, before);
}
template <class Item, int kThreads, int kSteps, class Read, class Save>
__device__ __forceinline__ void scan_tile(int64_t first, int64_t n, const Item& start, const Read& read,
                                          const Save& save) {
  Item mine, before;
  for (int k = 0; k < kSteps && first + k < n; ++k) mine = mine.then(read(scan_place<Item>(first + k, n)));
  scan_block<kThreads>(mine, before);
  Item sum = start.then(before);
  for (int k = 0; k < kSteps && first + k < n; ++k) {
    const int64_t p = scan_place<Item>(first + k, n);
    sum = sum.then(read(p));
    save(p, sum);
  }
}
// Exclusive scan in place: each of `count` items becomes the sum of those before it.
template <class Item, int kThreads>
__device__ __forceinline__ void scan_sums(Item* items, int64_t count) {
  Item start;
  for (int64_t begin = 0; begin < count; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    Item before;
    const Item all = scan_block<kThreads>(i < count ? items[i] : Item(), before);
    if (i < count) items[i] = start.then(before);
    start = start.then(all);
  }
}

}  // namespace fastloss::cuda
