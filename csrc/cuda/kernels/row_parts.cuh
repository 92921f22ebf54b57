// The sums of a row in parts: by one block, part after part, or by a cluster, whose blocks have a part each.
#pragma once
#include "../cluster.cuh"
#include "row_extras.cuh"

namespace fastloss::cuda {

// kCluster: this block has one part of the row, x[0, classes()), and the others of its cluster have the rest.
template <class Loss, class T, int kTeam, bool kBackward, bool kCluster>
struct RowOfParts : RowWithExtras<Loss, T, kTeam, kBackward, kCluster> {
  using Base = RowWithExtras<Loss, T, kTeam, kBackward, kCluster>;
  using Base::a, Base::lane, Base::classes, Base::unit, Base::sweep;
  using typename Base::R, typename Base::Kept;

  // Classes of the row before this block's.
  __device__ __forceinline__ int64_t before() const {
    return kCluster ? part_classes<T>(a.n) * cluster_rank() : 0;
  }
  // The team's sums, for all threads, from those of each.
  __device__ __forceinline__ Online<Loss, R> of_team(Online<Loss, R> o) const {
    if constexpr (kTeam == 1) return o;
    o.follow(team_max<kTeam>(o.m), unit);
    return team_sum<kTeam>(o);
  }
  // The sums of a row in parts, merged in order.
  __device__ __forceinline__ Online<Loss, R> sweep_each_part(Kept& kept) const {
    Online<Loss, R> o;
    const int64_t each = part_classes<T>(a.n);
#pragma unroll 1
    for (int64_t begin = 0; begin < a.n; begin += each) {
      const auto part = of_team(sweep(kept, begin, begin + each < a.n ? begin + each : a.n));
      o.merge(part.m, part.s, unit);
    }
    return o;
  }
  // The same where every block of the cluster has one part: it writes its sums into the shared memory of all.
  // Rows alternate between two places, so that one barrier is enough: when a block writes to a place again, the
  // barrier of the row between has told it that all have read what was there. No block is written to after the
  // last barrier, so that it may return.
  __device__ __forceinline__ Online<Loss, R> sweep_cluster(Kept& kept, int turn) const {
    struct alignas(2 * sizeof(R)) Part {
      R m, s;
    };
    FL_SHARED(Part, parts, 2 * kMostParts);
    Part* const place = parts + turn * kMostParts;
    const auto mine = of_team(sweep(kept, 0, classes()));
    const int blocks = parts_of(a.n * int64_t{sizeof(T)});
    if (lane < blocks) *peer_shared(place + cluster_rank(), lane) = Part{mine.m, mine.s};
    cluster_sync();
    Online<Loss, R> o;
#pragma unroll
    for (int p = 0; p < kMostParts; ++p)
      if (p < blocks) o.merge(place[p].m, place[p].s, unit);
    return o;
  }
};

}  // namespace fastloss::cuda
