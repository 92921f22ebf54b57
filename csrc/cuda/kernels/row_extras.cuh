// What only some losses compute of a row, besides its sums and the gradient of all classes: the term of
// losses/number_token.h, or several outputs with the log-probabilities of the classes in `index`
// (losses/token_statistics.h).
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

  // ---- a loss with kNumberTokens; every warp of a team computes the whole term
  __device__ __forceinline__ const R* distances_of_label() const {
    return static_cast<const R*>(a.number_table) + a.number_position[r] * a.num_number_tokens;
  }
  // The row's term of the loss; leaves in `number` what the gradient needs.
  __device__ __forceinline__ R number_term(const RowState<R>& row, NumberTerm<R>& number) const {
    const R weight = static_cast<const R*>(a.number_weight)[r];
    if (weight == 0) return 0;  // the same for the whole team
    constexpr int kStep = kTeam < 32 ? kTeam : 32;
    const unsigned mask = team_mask<kTeam>();
    const R* distance = distances_of_label();
    R top = -INFINITY, pivot = -INFINITY, sums[2] = {0, 0}, &total = sums[0], &rest = sums[1];
    for (int64_t k = lane % kStep; k < a.num_number_tokens; k += kStep)
      top = max(logit_of_class(a.number_ids[k]), top);
    top = warp_reduce<kStep>(top, Max{}, mask);
    for (int64_t k = lane % kStep; k < a.num_number_tokens; k += kStep)
      if (logit_of_class(a.number_ids[k]) == top) pivot = max(distance[k], pivot);
    pivot = warp_reduce<kStep>(pivot, Max{}, mask);
    if (pivot == -INFINITY) pivot = 0;  // all logits are NaN
    top = softmax_base(top);
    for (int64_t k = lane % kStep; k < a.num_number_tokens; k += kStep) {
      const R e = exp(logit_of_class(a.number_ids[k]) - top);
      total += e;
      rest += e * (distance[k] - pivot);
    }
    warp_reduce_all<kStep>(sums, Sum{}, mask);
    number = loss.number_tokens.term(weight, *static_cast<const R*>(a.number_max_distance), pivot,
                                     rest / total, top, total, row.m, row.log_sum);
    return number.value;
  }
  // Overwrites the gradient of the number tokens' classes.
  __device__ __forceinline__ void number_gradient(const Slope& s, const NumberTerm<R>& number, R g,
                                                  T* dx) const {
    if constexpr (kTeam > 1 && kTeam <= 32) __syncwarp(team_mask<kTeam>());
    if constexpr (kTeam > 32) __syncthreads();  // after `write`, whose values are overwritten
    const R* distance = distances_of_label();
    for (int64_t k = lane; k < a.num_number_tokens; k += kTeam) {
      const int64_t j = a.number_ids[k];
      if (j < 0 || j >= a.n || (k && a.number_ids[k - 1] == j)) continue;
      const R z = logit_of_class(j), d = z - s.m, p = exp(d - s.log_sum), e = exp(z - number.top);
      // a token may occur more than once: one thread adds all its terms
      R dz = j == t ? loss.grad_at_target(p, d, R(1), s.coef) : loss.grad(p, d, R(1), R(0), s.coef);
      for (int64_t same = k; same < a.num_number_tokens && a.number_ids[same] == j; ++same)
        dz += loss.number_tokens.self_term(number, e, p, distance[same]) * g;
      dx[j * a.dx_layout.class_stride] = narrow<T>(dz);
    }
  }

  // ---- a loss with kOutputs
  __device__ __forceinline__ Outputs<R> outputs() const { return {static_cast<R*>(a.loss) + r, a.rows}; }
  __device__ __forceinline__ Outputs<const R> upstream() const {
    return {static_cast<const R*>(a.upstream) + r, a.rows};
  }
  // The log-probabilities of the classes in `index`, and whether each is the most probable class.
  __device__ __forceinline__ void write_index_logps(const RowState<R>& row) const {
    const Outputs<R> out = outputs();
    for (int64_t i = lane; i < a.num_index; i += kTeam) {
      const R d = logit_of_class(a.index[r * a.num_index + i]) - row.m;
      out[Loss::kOutputs + i] = d - row.log_sum;
      out[Loss::kOutputs + a.num_index + i] = d == 0;
    }
  }
  // Overwrites the gradient of the classes in `index`.
  __device__ __forceinline__ void write_index_gradient(const Slope& s, T* dx) const {
    if constexpr (kTeam > 1 && kTeam <= 32) __syncwarp(team_mask<kTeam>());
    if constexpr (kTeam > 32) __syncthreads();  // after `write`, whose values are overwritten
    const int64_t* index = a.index + r * a.num_index;
    for (int64_t i = lane; i < a.num_index; i += kTeam) {
      const int64_t j = index[i];
      if (j < 0 || j >= a.n) continue;
      bool first = true;  // a class may occur in index more than once
      R g = 0;
      for (int64_t other = 0; other < a.num_index; ++other) {
        if (index[other] != j) continue;
        first = first && other >= i;
        g += upstream()[Loss::kOutputs + other];
      }
      if (!first) continue;
      const R z = logit_of_class(j), d = z - s.m;
      R dz = loss.grad_at_index(exp(d - s.log_sum), d, g * scale, s.coef);
      if constexpr (Loss::kSoftcap)
        if (cap > 0) dz *= bend(widen(x[j * a.x_layout.class_stride]));
      dx[j * a.dx_layout.class_stride] = narrow<T>(dz);
    }
  }
};

}  // namespace fastloss::cuda
