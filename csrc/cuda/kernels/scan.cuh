// Recursions in time on CUDA: a warp or a block for each sequence, with a parallel scan over its steps.
//
// The steps of a sequence are affine maps of a small state (drivers/scan.h). Each thread joins the maps of
// kSteps consecutive steps, a tree over the team joins those of the threads before it, and the thread then
// takes its steps one by one from the resulting state. The state is carried from tile to tile. The tree is
// the same for every sequence, so results do not depend on the batch. Only inputs and outputs go through
// memory.
#pragma once
#include "../../drivers/scan.h"
#include "../launch.cuh"
#include "../reduce.cuh"

namespace fastloss::cuda {

constexpr int kScanSteps = 4, kScanThreads = 128;  // steps of a thread; threads of a block of warps

template <class R>
__device__ __forceinline__ AffineStep<R> from_lane_below(const AffineStep<R>& s, int offset) {
  return {__shfl_up_sync(kFullMask, s.decay_u, offset), __shfl_up_sync(kFullMask, s.add_u, offset),
          __shfl_up_sync(kFullMask, s.decay_w, offset), __shfl_up_sync(kFullMask, s.mix, offset),
          __shfl_up_sync(kFullMask, s.add_w, offset)};
}

template <class Loss, class T, bool kBackward>
struct ScanTeam {
  using R = acc_t<T>;
  const ScanArgs& a;
  const Loss loss;
  const int64_t start, length;

  // Step i in the order of the pass.
  __device__ __forceinline__ int64_t place(int64_t i) const {
    return start + (kBackward ? i : length - 1 - i);
  }
  __device__ __forceinline__ R number(const void* base, int64_t at) const {
    return base ? R(widen(static_cast<const T*>(base)[at])) : R(0);
  }
  __device__ __forceinline__ ScanStep<R> read(int64_t i) const {
    ScanStep<R> x{};
    if (i >= length) return x;  // mask 0: the identity
    const int64_t at = place(i);
#pragma unroll
    for (int k = 0; k < Loss::kInputs; ++k) x.in[k] = number(a.in[k], at);
    x.terminated = a.terminated && a.terminated[at] ? 1 : 0;
    x.truncated = a.truncated && a.truncated[at] ? 1 : 0;
    x.mask = !a.mask || a.mask[at] ? 1 : 0;
    if constexpr (kBackward) {
#pragma unroll
      for (int k = 0; k < kScanGrads; ++k) x.grad[k] = number(a.grad[k], at);
    }
    return x;
  }
  __device__ __forceinline__ AffineStep<R> map(const ScanStep<R>& x) const {
    if constexpr (kBackward) {
      return loss.adjoint(x);
    } else {
      return loss.step(x);
    }
  }

  template <int kTeam>
  __device__ __forceinline__ void run(int64_t r) const {
    constexpr int kOutputs = kBackward ? Loss::kGradients : Loss::kOutputs;
    FL_SHARED(AffineStep<R>, part, kTeam / 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kTeam / 32;
    R u = kBackward ? R(0) : number(a.initial, r), w = 0;  // the state before this tile
    for (int64_t begin = 0; begin < length; begin += kTeam * kScanSteps) {
      const int64_t first = begin + int64_t{threadIdx.x % kTeam} * kScanSteps;
      ScanStep<R> x[kScanSteps];
      AffineStep<R> mine = AffineStep<R>::identity();
#pragma unroll
      for (int k = 0; k < kScanSteps; ++k) {
        x[k] = read(first + k);
        mine = mine.then(map(x[k]));
      }
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const AffineStep<R> below = from_lane_below(mine, offset);
        if (lane >= offset) mine = below.then(mine);
      }
      AffineStep<R> before = from_lane_below(mine, 1);
      if (lane == 0) before = AffineStep<R>::identity();
      R my_u = u, my_w = w;
      if constexpr (kTeam > 32) {
        __syncthreads();  // hazard: the tile before may still be read
        if (lane == 31) part[warp] = mine;
        __syncthreads();
        for (int k = 0; k < kTeam / 32; ++k) {
          if (k == warp) my_u = u, my_w = w;
          part[k].apply(u, w);
        }
      } else {
        mine.apply(u, w);
        u = __shfl_sync(kFullMask, u, 31);
        w = __shfl_sync(kFullMask, w, 31);
      }
      before.apply(my_u, my_w);
#pragma unroll
      for (int k = 0; k < kScanSteps; ++k) {
        const R u_before = my_u, w_before = my_w;
        map(x[k]).apply(my_u, my_w);
        R out[kOutputs];
        if constexpr (kBackward) {
          loss.gradient(x[k], u_before, w_before, out);
        } else {
          loss.output(x[k], u_before, w_before, my_u, my_w, out);
        }
        if (first + k < length) {
#pragma unroll
          for (int o = 0; o < kOutputs; ++o)
            if (a.out[o]) static_cast<T*>(a.out[o])[place(first + k)] = narrow<T>(out[o]);
        }
      }
    }
    if constexpr (kBackward) {
      if (a.initial_grad && threadIdx.x % kTeam == 0) static_cast<T*>(a.initial_grad)[r] = narrow<T>(w);
    }
  }
};

template <class Loss, class T, int kTeam, bool kBackward>
__global__ void __launch_bounds__(kTeam > 32 ? kTeam : kScanThreads) scan_kernel(ScanArgs a) {
  constexpr int kBlock = kTeam > 32 ? kTeam : kScanThreads;
  const int64_t r = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / kTeam;
  if (r >= a.rows) return;  // whole teams
  int64_t start = r * a.n, length = a.n;
  if (a.offsets) {  // clamped: memory outside is never accessed
    start = a.offsets[r] > 0 ? a.offsets[r] : 0;
    const int64_t end = a.offsets[r + 1] < a.n ? a.offsets[r + 1] : a.n;
    length = end > start ? end - start : 0;
  }
  ScanTeam<Loss, T, kBackward>{a, Loss(a), start, length}.template run<kTeam>(r);
}

template <class Loss, class T, int kTeam, bool kBackward>
void launch_scan_team(const ScanArgs& a, cudaStream_t stream) {
  const int block = kTeam > 32 ? kTeam : kScanThreads;
  const int64_t blocks = (a.rows * kTeam + block - 1) / block;
  launch_1d<&scan_kernel<Loss, T, kTeam, kBackward>>(blocks, block, 0, stream, a);
}
constexpr int64_t kWarpScan = 2048;  // longer sequences get a block; those of a packed batch always a warp

template <class Loss, class T, bool kBackward>
void launch_scan(const ScanArgs& a, cudaStream_t stream) {
  if (a.offsets || a.n <= kWarpScan) return launch_scan_team<Loss, T, 32, kBackward>(a, stream);
  launch_scan_team<Loss, T, 256, kBackward>(a, stream);
}

}  // namespace fastloss::cuda
