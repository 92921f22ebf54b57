// The sums of a row of logits on CUDA: relative to a running maximum in each thread of a team, then merged
// in an order that depends on the team alone.
#pragma once
#include "../../drivers/row_loss.h"
#include "../../math/online_softmax.h"
#include "../reduce.cuh"

namespace fastloss::cuda {

// The scale of exponents: z - z' = (u - u') * unit, where u is the logit as stored, unless it is capped. So
// a class takes one multiplication, by the scale and log2(e) together.
template <class R>
struct Unit {
  R of_z, of_two;  // factors for exponents of e and of 2
  __device__ __forceinline__ explicit Unit(R unit) : of_z(unit), of_two(unit * kLog2e<R>) {}
  __device__ __forceinline__ R distance(R below) const { return product(below, of_z); }
  __device__ __forceinline__ R exp_of(R below) const {  // e^(below * unit)
    if constexpr (sizeof(R) == 4) return exp2_approx(below * of_two);
    return exp(below * of_z);
  }
  // log_sum as prob_of takes it
  __device__ __forceinline__ R kept(R log_sum) const {
    return sizeof(R) == 4 ? log_sum * kLog2e<R> : log_sum;
  }
  __device__ __forceinline__ R prob_of(R below, R logs) const {
    if constexpr (sizeof(R) == 4) return exp2_approx(fmaf(below, of_two, -logs));
    return exp(below * of_z - logs);
  }
};

// Online softmax: the running maximum of u, the sum of exp(z - max) over all classes but the target, and the
// loss's sums.
template <class Loss, class R>
struct Online {
  using Sums = typename Loss::template Sums<R>;
  static constexpr int kFields = std::is_empty_v<Sums> ? 0 : sizeof(Sums) / sizeof(R);
  R m = -INFINITY, s = 0;
  Sums extra{};

  // Whether the loss's sums include the sum of exponentials: then s is not used.
  static constexpr bool kHasTotal = requires(const Sums& sums) { sums.total(); };

  __device__ __forceinline__ R base() const { return softmax_base(m); }
  __device__ __forceinline__ void follow(R top, const Unit<R>& unit) {
    if (!(top > m)) return;
    if (m != -INFINITY) {
      const R shift = finite_shift(unit.distance(m - top));
      const R factor = kFields ? exp(shift) : unit.exp_of(m - top);
      if constexpr (kHasTotal) {
        extra.move(shift, factor, extra.total());
      } else {
        extra.move(shift, factor, s);
        s *= factor;
      }
    }
    m = top;
  }
  // Adds the sums of another, relative to the same maximum.
  __device__ __forceinline__ void take(const Online& o) {
    s += o.s;
    R mine[kFields + 1], theirs[kFields + 1];
    std::memcpy(mine, &extra, kFields * sizeof(R));
    std::memcpy(theirs, &o.extra, kFields * sizeof(R));
#pragma unroll
    for (int f = 0; f < kFields; ++f) mine[f] += theirs[f];
    std::memcpy(&extra, mine, kFields * sizeof(R));
  }
  // Adds the sums of another part of the row. For losses without sums of their own.
  __device__ __forceinline__ void merge(R top, R sum, const Unit<R>& unit) {
    static_assert(kFields == 0);
    const R joint = larger(top, m);
    const auto factor = [&](R from) {  // -infinity: nothing was counted
      return from == joint || from == -INFINITY ? R(1) : unit.exp_of(from - joint);
    };
    s = alone(s, factor(m)) + alone(sum, factor(top));
    m = joint;
  }
  // The sums of kLanes lanes; all have the same maximum.
  template <int kLanes>
  __device__ __forceinline__ Online added(unsigned mask = kFullMask) const {
    R all[kFields + 1];
    std::memcpy(all, &extra, kFields * sizeof(R));
    all[kFields] = s;
    warp_reduce_all<kLanes>(all, Sum{}, mask);
    Online o;
    o.m = m;
    o.s = all[kFields];
    std::memcpy(&o.extra, all, kFields * sizeof(R));
    return o;
  }
};

// A team merges in two steps, with one exponential for each thread: team_max, then each thread rescales to
// it, then team_sum.
template <int kTeam, class R>
__device__ __forceinline__ R team_max(R top) {
  constexpr int kWarps = kTeam / 32;
  const auto join = [](R mine, R other) { return larger(other, mine); };
  top = warp_reduce < kTeam<32 ? kTeam : 32>(top, join, team_mask<kTeam>());
  if constexpr (kWarps > 1) {
    FL_SHARED(R, tops, kWarps);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    top = warp_reduce<kWarps>(tops[threadIdx.x % kWarps], join);
  }
  return top;
}
template <int kTeam, class O>
__device__ __forceinline__ O team_sum(O o) {
  constexpr int kWarps = kTeam / 32;
  o = o.template added < kTeam<32 ? kTeam : 32>(team_mask<kTeam>());
  if constexpr (kWarps > 1) {
    FL_SHARED(O, part, kWarps);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = o;
    __syncthreads();
    o = part[threadIdx.x % kWarps].template added<kWarps>();
  }
  return o;
}

}  // namespace fastloss::cuda
