// What only some losses have beside the sums and the gradient of all classes of a row: the term of
// losses/number_token.h, and results in planes with the log-probabilities of the classes asked for.
#pragma once
#include "../../losses/number_token.h"
#include "row_sweeps.cuh"

namespace fastloss::cuda {

template <class Loss, class T, int kTeam, bool kBackward>
struct RowWithExtras : SweptRow<Loss, T, kTeam, kBackward> {
  using Base = SweptRow<Loss, T, kTeam, kBackward>;
  using Base::a, Base::loss, Base::x, Base::r, Base::t, Base::lane, Base::scale, Base::cap;
  using Base::bend, Base::logit_of_class;
  using typename Base::R, typename Base::Slope;

  // ---- the term of a loss with numbers; every warp of a team computes it
  __device__ __forceinline__ const R* distances_of_label() const {
    return static_cast<const R*>(a.number_table) + a.number_position[r] * a.numbers;
  }
  __device__ __forceinline__ R number_term(const RowState<R>& row, NumberTerm<R>& number) const {
    const R weight = static_cast<const R*>(a.number_weight)[r];
    if (weight == 0) return 0;  // the same for the whole team
    constexpr int kStep = kTeam < 32 ? kTeam : 32;
    const unsigned mask = team_mask<kTeam>();
    const R* distance = distances_of_label();
    R top = -INFINITY, sums[2] = {0, 0}, &total = sums[0], &weighted_distance = sums[1];
    for (int64_t k = lane % kStep; k < a.numbers; k += kStep) top = max(logit_of_class(a.number_ids[k]), top);
    top = warp_reduce<kStep>(top, Max{}, mask);
    top = softmax_base(top);
    for (int64_t k = lane % kStep; k < a.numbers; k += kStep) {
      const R e = exp(logit_of_class(a.number_ids[k]) - top);
      total += e;
      weighted_distance += e * distance[k];
    }
    warp_reduce_all<kStep>(sums, Sum{}, mask);
    number = loss.numbers.term(weight, *static_cast<const R*>(a.number_worst), weighted_distance / total, top,
                               total, row.m, row.log_sum);
    return number.value;
  }
  __device__ __forceinline__ void number_gradient(const Slope& s, const NumberTerm<R>& number, R g,
                                                  T* dx) const {
    if constexpr (kTeam > 1 && kTeam <= 32) __syncwarp(team_mask<kTeam>());
    if constexpr (kTeam > 32) __syncthreads();  // after the writes of `write`
    const R* distance = distances_of_label();
    for (int64_t k = lane; k < a.numbers; k += kTeam) {
      const int64_t j = a.number_ids[k];
      if (j < 0 || j >= a.n || (k && a.number_ids[k - 1] == j)) continue;
      const R z = logit_of_class(j), d = z - s.m, p = exp(d - s.log_sum), e = exp(z - number.top);
      R dz = j == t ? loss.grad_at_target(p, d, R(1), s.coef) : loss.grad(p, d, R(1), R(0), s.coef);
      for (int64_t same = k; same < a.numbers && a.number_ids[same] == j;
           ++same)  // it may stand there more than once
        dz += loss.numbers.self_term(number, e, p, distance[same]) * g;
      dx[j * a.dx_layout.class_stride] = narrow<T>(dz);
    }
  }

  // ---- results of a loss with planes
  __device__ __forceinline__ Planes<R> results() const { return {static_cast<R*>(a.loss) + r, a.rows}; }
  __device__ __forceinline__ Planes<const R> upstream() const {
    return {static_cast<const R*>(a.upstream) + r, a.rows};
  }
  __device__ __forceinline__ void write_asked(const RowState<R>& row) const {
    const Planes<R> out = results();
    for (int64_t i = lane; i < a.asked_each; i += kTeam) {
      const R d = logit_of_class(a.asked[r * a.asked_each + i]) - row.m;
      out[Loss::kPlanes + i] = d - row.log_sum;
      out[Loss::kPlanes + a.asked_each + i] = d == 0;
    }
  }
  __device__ __forceinline__ void asked_gradient(const Slope& s, T* dx) const {
    if constexpr (kTeam > 1 && kTeam <= 32) __syncwarp(team_mask<kTeam>());
    if constexpr (kTeam > 32) __syncthreads();  // after the writes of `write`
    const int64_t* asked = a.asked + r * a.asked_each;
    for (int64_t i = lane; i < a.asked_each; i += kTeam) {
      const int64_t j = asked[i];
      if (j < 0 || j >= a.n) continue;
      bool first = true;  // a class may be asked for more than once
      R g = 0;
      for (int64_t other = 0; other < a.asked_each; ++other) {
        if (asked[other] != j) continue;
        first = first && other >= i;
        g += upstream()[Loss::kPlanes + other];
      }
      if (!first) continue;
      const R z = logit_of_class(j), d = z - s.m;
      R dz = loss.asked_for(exp(d - s.log_sum), d, g * scale, s.coef);
      if constexpr (Loss::kSoftcap)
        if (cap > 0) dz *= bend(widen(x[j * a.x_layout.class_stride]));
      dx[j * a.dx_layout.class_stride] = narrow<T>(dz);
    }
  }
};

}  // namespace fastloss::cuda
