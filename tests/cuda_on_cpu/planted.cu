// Pairs of kernels that differ in one mistake, to see that the builds of the shim find it: `planted NAME
// good|bad` runs one of them and checks what it wrote. test_shim.py says which build must find what.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "cluster.cuh"

namespace {

using fastloss::cuda::cluster_rank;
using fastloss::cuda::cluster_size;
using fastloss::cuda::cluster_sync;
using fastloss::cuda::launch_clusters;
using fastloss::cuda::peer_shared;
constexpr unsigned kFull = 0xffffffffu;

// x[i] = i; all numbers are small integers, so every order of summation gives the same.
#define KERNEL         \
  template <bool kBad> \
  __global__ void

__device__ float warp_sum(float v, unsigned mask = kFull, int width = 32) {
  for (int d = width / 2; d; d /= 2) v += __shfl_xor_sync(mask, v, d, width);
  return v;
}

// ---- barriers and masks

KERNEL barrier_in_both_branches(const float*, float* y) {
  if (kBad) {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1;
}
KERNEL return_before_barrier(const float*, float* y) {
  if (kBad && threadIdx.x == 5) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
KERNEL caller_outside_mask(const float*, float* y) {
  const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  y[threadIdx.x] = __shfl_sync(kBad ? 0x0000ffffu : mask, 1.f, 0, 16);
}
KERNEL shuffle_from_absent_lane(const float* x, float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_down_sync(0xffffu, x[threadIdx.x], 8, kBad ? 32 : 16);
}
KERNEL lanes_at_different_collectives(const float*, float* y) {
  if (kBad && threadIdx.x & 1)
    y[threadIdx.x] = __shfl_xor_sync(kFull, 1, 1);
  else
    y[threadIdx.x] = __any_sync(kFull, 1);
}
KERNEL lanes_with_different_masks(const float* x, float* y) {
  const bool low = threadIdx.x < 16;
  y[threadIdx.x] = warp_sum(x[threadIdx.x], low ? (kBad ? kFull : 0xffffu) : 0xffff0000u, 16);
}
KERNEL full_mask_in_part_of_warp(const float* x, float* y) {
  float v = 0;
  if (!kBad || threadIdx.x < 8) v = warp_sum(threadIdx.x < 8 ? x[threadIdx.x] : 0.f);
  if (threadIdx.x == 0) y[0] = v;
}
KERNEL full_mask_in_short_warp(const float* x, float* y) {  // a block of 8
  y[threadIdx.x] = warp_sum(x[threadIdx.x], kBad ? kFull : 0xffu, 8);
}
KERNEL mask_names_lane_that_returned(const float* x, float* y) {
  if (kBad && threadIdx.x == 31) return;
  const float sum = warp_sum(x[threadIdx.x]);
  if (threadIdx.x == 0) y[0] = sum;
}

// ---- what is visible to whom

KERNEL missing_barrier(const float* x, float* y) {  // between the warps' sums and their sum
  FL_SHARED(float, part, 8);
  const float v = warp_sum(x[threadIdx.x]);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  if (!kBad) __syncthreads();
  if (threadIdx.x < 32) {
    const float sum = warp_sum(threadIdx.x < 8 ? part[threadIdx.x] : 0.f);
    if (threadIdx.x == 0) y[0] = sum;
  }
}
KERNEL missing_barrier_after_merge(const float* x, float* y) {  // before all threads read the merged sum
  FL_SHARED(float, part, 8);
  const float v = warp_sum(x[threadIdx.x]);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int w = 0; w < 8; ++w) sum += part[w];
    part[0] = sum;
  }
  if (!kBad) __syncthreads();
  y[threadIdx.x] = part[0];
}
KERNEL missing_barrier_before_reuse(const float* x, float* y) {  // a tile is filled again while it is read
  FL_DYN_SHARED(float, tile);
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    tile[threadIdx.x] = x[round * blockDim.x + threadIdx.x];
    __syncthreads();
    sum += tile[blockDim.x - 1 - threadIdx.x];
    if (!kBad) __syncthreads();
  }
  y[threadIdx.x] = sum;
}
KERNEL missing_syncwarp(const float* x, float* y) {
  FL_SHARED(float, pair, 64);
  pair[threadIdx.x] = x[threadIdx.x];
  const bool any = __any_sync(kFull, 1);  // meets the lanes, orders no memory
  if (!kBad) __syncwarp();
  y[threadIdx.x] = any ? pair[threadIdx.x ^ 1] : 0;
}
KERNEL shared_memory_nobody_wrote(const float* x, float* y) {
  FL_SHARED(float, s, 64);
  if (!kBad || threadIdx.x != 0) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
KERNEL plain_store_read_by_another_block(const float* x, float* y) {  // the last block sums what all wrote
  FL_SHARED(bool, last, 1);
  float* part = y + 1;
  auto* ticket = reinterpret_cast<unsigned*>(y + 1 + gridDim.x);
  const float sum = warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) {
    if (kBad)
      part[blockIdx.x] = sum;
    else
      __stcg(part + blockIdx.x, sum);
    __threadfence();
    last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last[0] && threadIdx.x == 0) {
    float total = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) total += __ldcg(part + b);
    y[0] = total;
    atomicExch(ticket, 0u);
  }
}
KERNEL two_blocks_write_one_word(const float*, float* y) {
  if (threadIdx.x == 0) y[kBad ? 0 : blockIdx.x] = 1;
}
KERNEL plain_beside_atomic(const float*, float* y) {
  if (kBad && threadIdx.x == 0)
    y[0] += 1;
  else
    atomicAdd(y, 1.f);
}
KERNEL copy_not_waited_for(const float* x, float* y) {
  FL_SHARED(float, s, 64);
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);
  __pipeline_commit();
  __pipeline_wait_prior(kBad ? 1 : 0);
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}

// ---- clusters of two blocks

// y[block * 32 + thread] is what the thread of the other block wrote.
KERNEL cluster_barrier_in_both_branches(const float*, float* y) {
  if (kBad && cluster_rank() == 1)
    cluster_sync();
  else
    cluster_sync();
  y[blockIdx.x * 32 + threadIdx.x] = 1;
}
KERNEL return_before_cluster_barrier(const float*, float* y) {
  if (kBad && blockIdx.x == 1 && threadIdx.x == 5) return;
  cluster_sync();
  y[blockIdx.x * 32 + threadIdx.x] = 1;
}
KERNEL block_barrier_while_cluster_waits(const float*, float* y) {
  if (kBad && blockIdx.x == 3)
    __syncthreads();
  else
    cluster_sync();
  y[blockIdx.x * 32 + threadIdx.x] = 1;
}
template <bool kStarted, bool kBarrier, bool kStays, bool kPeerReads>
__device__ void exchange(const float* x, float* y) {
  FL_SHARED(float, got, 32);
  const int t = threadIdx.x, at = blockIdx.x * 32 + t, peer = cluster_rank() ^ 1;
  if (kStarted) cluster_sync();
  if (kPeerReads) {
    got[t] = x[at];
    if (kBarrier) cluster_sync();
    y[at] = *peer_shared(got + t, peer);
  } else {
    *peer_shared(got + t, peer) = x[at];
    if (kBarrier) cluster_sync();
    y[at] = got[t];
  }
  if (kStays) cluster_sync();
}
KERNEL peer_may_not_have_started(const float* x, float* y) { exchange<!kBad, true, true, false>(x, y); }
KERNEL missing_cluster_barrier(const float* x, float* y) { exchange<true, !kBad, true, false>(x, y); }
KERNEL read_before_peer_has_written(const float* x, float* y) { exchange<true, !kBad, true, true>(x, y); }
KERNEL peer_may_have_returned(const float* x, float* y) { exchange<true, true, !kBad, true>(x, y); }
KERNEL peer_returns_without_barrier(const float* x, float* y) {  // after its last use, perhaps
  FL_SHARED(float, got, 32);
  const int t = threadIdx.x, at = blockIdx.x * 32 + t;
  got[t] = x[at ^ 32];
  cluster_sync();
  y[at] = cluster_rank() == 0 ? *peer_shared(got + t, 1) + 32 : x[at ^ 32];
  if (!kBad) cluster_sync();
}
KERNEL block_barrier_for_cluster_barrier(const float* x, float* y) {
  FL_SHARED(float, got, 32);
  const int t = threadIdx.x, at = blockIdx.x * 32 + t;
  cluster_sync();
  *peer_shared(got + t, cluster_rank() ^ 1) = x[at];
  if (kBad)
    __syncthreads();
  else
    cluster_sync();
  y[at] = got[t ^ 1];
  cluster_sync();
}
KERNEL one_place_for_every_turn(const float* x,
                                float* y) {  // a block overwrites what its peer has yet to read
  FL_SHARED(float, got, 64);
  const int t = threadIdx.x, at = blockIdx.x * 32 + t;
  float sum = 0;
  cluster_sync();
  for (int turn = 0; turn < 3; ++turn) {
    float* const place = got + (kBad ? 0 : turn % 2 * 32);
    *peer_shared(place + t, cluster_rank() ^ 1) = x[at] + turn;
    cluster_sync();
    sum += place[t];
  }
  y[at] = sum - 2 * x[at ^ 32] - 3;
}
KERNEL rank_that_no_peer_has(const float* x, float* y) {
  FL_SHARED(float, got, 32);
  const int t = threadIdx.x, at = blockIdx.x * 32 + t;
  cluster_sync();
  *peer_shared(got + t, kBad ? 2 : cluster_rank() ^ 1) = x[at];
  cluster_sync();
  y[at] = got[t];
}
KERNEL address_that_is_not_shared(const float* x, float* y) {
  FL_SHARED(float, got, 32);
  const int t = threadIdx.x, at = blockIdx.x * 32 + t;
  cluster_sync();
  *peer_shared(kBad ? y + t : got + t, cluster_rank() ^ 1) = x[at];
  cluster_sync();
  y[at] = got[t];
}
KERNEL two_blocks_of_a_cluster_write_one_word(const float*, float* y) {
  if (threadIdx.x == 0 && cluster_rank() == 0) y[0] = y[1] = 1;
  if (!kBad) cluster_sync();
  if (threadIdx.x == 0 && cluster_rank() == 1) y[1] = 1;
}

// ---- addresses

// Sum over x[0, n) by one warp, in pieces of 16 bytes where they fit.
template <bool kForgetHead, bool kOverrunTail>
__device__ float sum_of(const float* x, int n) {
  int head = static_cast<int>(-(reinterpret_cast<uintptr_t>(x) / 4) & 3);
  if (kForgetHead) head = 0;
  const int body = kOverrunTail ? (n - head + 3) / 4 * 4 : (n - head) / 4 * 4;
  float sum = 0;
  for (int i = threadIdx.x; i < head; i += 32) sum += x[i];
  for (int i = head + threadIdx.x * 4; i < head + body; i += 128) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(x + i));
    sum += v.x + v.y + v.z + (i + 3 < n ? v.w : 0.f);
  }
  for (int i = head + body + threadIdx.x; i < n; i += 32) sum += x[i];
  return warp_sum(sum);
}
KERNEL overrun_of_tail(const float* x, float* y) {
  const float sum = sum_of<false, kBad>(x, 35);
  if (threadIdx.x == 0) y[0] = sum;
}
KERNEL forgotten_unaligned_head(const float* x, float* y) {
  const float sum = sum_of<kBad, false>(x, 35);
  if (threadIdx.x == 0) y[0] = sum;
}
KERNEL overrun_of_static_shared(const float* x, float* y) {
  FL_SHARED(float, s, 32);
  s[threadIdx.x + (kBad ? 1 : 0)] = x[threadIdx.x];
  y[threadIdx.x] = x[threadIdx.x];
}
KERNEL overrun_of_dynamic_shared(const float* x, float* y) {
  FL_DYN_SHARED(float, s);
  s[threadIdx.x + (kBad ? 1 : 0)] = x[threadIdx.x];
  y[threadIdx.x] = x[threadIdx.x];
}
KERNEL target_out_of_range(const float* x, float* y) {
  const int64_t n = 32, target = n + threadIdx.x;
  y[threadIdx.x] = kBad || target < n ? x[target] : 0.f;
}
KERNEL index_past_2_to_31(const float* x, float* y) {
  const int row = 70000 + threadIdx.x, n = 40000 * gridDim.x;
  const int64_t at = kBad ? row * n : int64_t{row} * n;
  y[threadIdx.x] = at == 2800000000ll + int64_t{threadIdx.x} * n ? x[threadIdx.x] : 0.f;
}

#undef KERNEL

// ---- the table

using Kernel = void (*)(const float*, float*);
struct Pair {
  const char* name;
  Kernel good, bad;
  unsigned blocks, threads;
  size_t shared;       // dynamic, in floats
  int n, offset;       // of x: elements, and how many of them the base is away from alignment
  int outputs, extra;  // of y: elements to be checked, and others, which start as 0
  float (*expected)(int i);
  int cluster = 1;
};

float one(int) { return 1; }
float same(int i) { return static_cast<float>(i); }
float neighbour(int i) { return static_cast<float>(i ^ 1); }
float zero(int) { return 0; }
float peers(int i) { return static_cast<float>(i ^ 32); }

#define PAIR(name) #name, &name<false>, &name<true>
const Pair kPairs[] = {
    // name, blocks, threads, shared, n, offset, outputs, extra, expected, cluster
    {PAIR(barrier_in_both_branches), 1, 64, 0, 0, 0, 64, 0, one},
    {PAIR(return_before_barrier), 1, 64, 0, 0, 0, 64, 0, one},
    {PAIR(caller_outside_mask), 1, 32, 0, 0, 0, 32, 0, one},
    {PAIR(shuffle_from_absent_lane), 1, 32, 0, 16, 0, 8, 8, [](int i) { return i + 8.f; }},
    {PAIR(lanes_at_different_collectives), 1, 32, 0, 0, 0, 32, 0, one},
    {PAIR(lanes_with_different_masks), 1, 32, 0, 32, 0, 32, 0, [](int i) { return i < 16 ? 120.f : 376.f; }},
    {PAIR(full_mask_in_part_of_warp), 1, 32, 0, 8, 0, 1, 0, [](int) { return 28.f; }},
    {PAIR(full_mask_in_short_warp), 1, 8, 0, 8, 0, 8, 0, [](int) { return 28.f; }},
    {PAIR(mask_names_lane_that_returned), 1, 32, 0, 32, 0, 1, 0, [](int) { return 496.f; }},
    {PAIR(missing_barrier), 1, 256, 0, 256, 0, 1, 0, [](int) { return 32640.f; }},
    {PAIR(missing_barrier_after_merge), 1, 256, 0, 256, 0, 256, 0, [](int) { return 32640.f; }},
    {PAIR(missing_barrier_before_reuse), 1, 256, 256, 1024, 0, 256, 0, [](int i) { return 2556.f - 4 * i; }},
    {PAIR(missing_syncwarp), 1, 64, 0, 64, 0, 64, 0, neighbour},
    {PAIR(shared_memory_nobody_wrote), 1, 64, 0, 64, 0, 64, 0, [](int i) { return 63.f - i; }},
    {PAIR(plain_store_read_by_another_block), 5, 32, 0, 160, 0, 1, 6, [](int) { return 12720.f; }},
    {PAIR(two_blocks_write_one_word), 2, 32, 0, 0, 0, 1, 1, one},
    {PAIR(plain_beside_atomic), 1, 64, 0, 0, 0, 1, 0, [](int) { return 64.f; }},
    {PAIR(copy_not_waited_for), 1, 64, 0, 64, 0, 64, 0, neighbour},
    {PAIR(cluster_barrier_in_both_branches), 4, 32, 0, 0, 0, 128, 0, one, 2},
    {PAIR(return_before_cluster_barrier), 4, 32, 0, 0, 0, 128, 0, one, 2},
    {PAIR(block_barrier_while_cluster_waits), 4, 32, 0, 0, 0, 128, 0, one, 2},
    {PAIR(peer_may_not_have_started), 4, 32, 0, 128, 0, 128, 0, peers, 2},
    {PAIR(missing_cluster_barrier), 4, 32, 0, 128, 0, 128, 0, peers, 2},
    {PAIR(read_before_peer_has_written), 4, 32, 0, 128, 0, 128, 0, peers, 2},
    {PAIR(peer_may_have_returned), 4, 32, 0, 128, 0, 128, 0, peers, 2},
    {PAIR(peer_returns_without_barrier), 4, 32, 0, 128, 0, 128, 0, peers, 2},
    {PAIR(block_barrier_for_cluster_barrier), 4, 32, 0, 128, 0, 128, 0, [](int i) { return float(i ^ 33); },
     2},
    {PAIR(one_place_for_every_turn), 4, 32, 0, 128, 0, 128, 0, peers, 2},
    {PAIR(rank_that_no_peer_has), 4, 32, 0, 128, 0, 128, 0, peers, 2},
    {PAIR(address_that_is_not_shared), 4, 32, 0, 128, 0, 128, 0, peers, 2},
    {PAIR(two_blocks_of_a_cluster_write_one_word), 2, 32, 0, 0, 0, 2, 0, one, 2},
    {PAIR(overrun_of_tail), 1, 32, 0, 35, 0, 1, 0, [](int) { return 595.f; }},
    {PAIR(forgotten_unaligned_head), 1, 32, 0, 35, 1, 1, 0, [](int) { return 595.f; }},
    {PAIR(overrun_of_static_shared), 1, 32, 0, 32, 0, 32, 0, same},
    {PAIR(overrun_of_dynamic_shared), 1, 32, 32, 32, 0, 32, 0, same},
    {PAIR(target_out_of_range), 1, 32, 0, 32, 0, 32, 0, zero},
    {PAIR(index_past_2_to_31), 1, 32, 0, 32, 0, 32, 0, same},
};

void run(const Pair& pair, Kernel kernel) {
  std::vector<float> x(pair.offset + pair.n), y(pair.outputs + pair.extra);  // exactly sized
  float* base = x.data() + pair.offset;
  for (int i = 0; i < pair.n; ++i) base[i] = static_cast<float>(i);
  launch_clusters(kernel, dim3(pair.blocks), dim3(pair.threads), pair.shared * sizeof(float), nullptr,
                  pair.cluster, base, y.data());
  for (int i = 0; i < pair.outputs; ++i)
    if (!(y[i] == pair.expected(i)))
      throw std::runtime_error("wrong result: element " + std::to_string(i) + " is " + std::to_string(y[i]) +
                               ", expected " + std::to_string(pair.expected(i)));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "", which = argc > 2 ? argv[2] : "";
  for (const Pair& pair : kPairs) {
    if (name == "list") std::puts(pair.name);
    if (name != "all" && name != pair.name) continue;
    try {
      run(pair, which == "bad" ? pair.bad : pair.good);
      std::printf("%s %s: passed\n", pair.name, which.c_str());
    } catch (const std::exception& e) {
      std::printf("%s %s: %s\n", pair.name, which.c_str(), e.what());
      return 1;
    }
  }
  return 0;
}
