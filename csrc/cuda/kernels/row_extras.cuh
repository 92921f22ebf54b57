// What only some losses compute of a row, besides its sums and the gradient of all classes: the term of
// losses/number_token.h, or several outputs with the log-probabilities of the classes in `index`
// (losses/token_statistics.h).
#pragma once
#include "../../losses/number_token.h"
#include "row_sweeps.cuh"

namespace fastloss::cuda {

template <class Loss, class T, int kTeam, bool kBackward, bool kCluster>
struct RowWithExtras : SweptRow<Loss, T, kTeam, kBackward, kCluster> {
  using Base = SweptRow<Loss, T, kTeam, kBackward, kCluster>;
  using Base::a, Base::loss, Base::x, Base::r, Base::t, Base::lane, Base::scale, Base::cap, Base::unit;
  using Base::bend, Base::logit_of_class;
  using typename Base::R, typename Base::Slope;

  // ---- a loss with kNumberTokens; every warp of a team computes the whole term
  __device__ __forceinline__ const R* distances_of_label() const {
    return static_cast<const R*>(a.number_table) + a.number_position[r] * a.num_number_tokens;
  }
  // The number token that a lane of the team's first warp looks at first. Loaded before the sweep over the row,
  // which the latency of these dependent loads overlaps with; only vocabularies with more than a warp's number
  // tokens load more afterwards.
  struct FirstToken {
    R weight = 0;  // of the row's term
    R logit = -INFINITY, distance = 0;
  };
  static constexpr int kTokens = kTeam < 32 ? kTeam : 32;
  __device__ __forceinline__ FirstToken load_first_token() const {
    FirstToken first;
    if (lane >= kTokens) return first;
    first.weight = static_cast<const R*>(a.number_weight)[r];
    if (first.weight != 0 && lane < a.num_number_tokens) {  // only then is the label's position valid
      first.distance = distances_of_label()[lane];
      first.logit = logit_of_class(a.number_ids[lane]);
    }
    return first;
  }
  // What the row keeps of its number tokens: a block has it in shared memory, since registers limit the number
  // of its threads.
  struct Number {
    FirstToken first[kTeam > 32 ? kTokens : 1];
    R weight, pivot, rest, top, total;  // as in NumberTerm
    R log_sum, g;                       // of the row, and the gradient of its term
    NumberTerm<R> term;
  };
  Number own;
  __device__ __forceinline__ Number& kept_number() {
    if constexpr (kTeam > 32) {
      FL_SHARED(Number, of_block, 1);
      return of_block[0];
    } else {
      return own;
    }
  }
  // Keeps the token and the sums over all; by the first warp of a block, of which the others see it after its
  // next barrier.
  __device__ __forceinline__ void keep_number(const FirstToken& first) {
    if (lane >= kTokens) return;
    Number& kept = kept_number();
    const bool writes = kTeam <= 32 || lane == 0;
    kept.first[kTeam > 32 ? lane : 0] = first;
    if (writes) kept.weight = first.weight;
    if (first.weight == 0) return;  // the same for the whole team
    const unsigned mask = team_mask<kTeam>();
    const R* distances = distances_of_label();
    const auto logit = [&](int64_t k) { return k < kTokens ? first.logit : logit_of_class(a.number_ids[k]); };
    const auto distance = [&](int64_t k) { return k < kTokens ? first.distance : distances[k]; };
    R top = -INFINITY, pivot = -INFINITY, sums[2] = {0, 0}, &total = sums[0], &rest = sums[1];
    for (int64_t k = lane; k < a.num_number_tokens; k += kTokens) top = max(logit(k), top);
    top = warp_reduce<kTokens>(top, Max{}, mask);
    for (int64_t k = lane; k < a.num_number_tokens; k += kTokens)
      if (logit(k) == top) pivot = max(distance(k), pivot);
    pivot = warp_reduce<kTokens>(pivot, Max{}, mask);
    if (pivot == -INFINITY) pivot = 0;  // all logits are NaN
    top = softmax_base(top);
    for (int64_t k = lane; k < a.num_number_tokens; k += kTokens) {
      const R e = exp(logit(k) - top);
      total += e;
      rest += e * (distance(k) - pivot);
    }
    warp_reduce_all<kTokens>(sums, Sum{}, mask);
    if (!writes) return;
    kept.pivot = pivot;
    kept.rest = rest / total;
    kept.top = top;
    kept.total = total;
  }
  // The row's term of the loss and its dense_coef; keeps what the gradient needs.
  struct TermAndCoef {
    R value, dense_coef;
  };
  __device__ __forceinline__ TermAndCoef number_term(const RowState<R>& row) {
    Number& kept = kept_number();
    if (kept.weight == 0) return {0, 0};
    const NumberTerm<R> term =
        loss.number_tokens.term(kept.weight, *static_cast<const R*>(a.number_max_distance), kept.pivot,
                                kept.rest, kept.top, kept.total, row.m, row.log_sum);
    if (kTeam <= 32 || lane == 0) kept.term = term;
    return {term.value, term.dense_coef};
  }
  // Keeps what number_gradient will need; before `write`.
  __device__ __forceinline__ void keep_for_gradient(R log_sum, R g) {
    if (kTeam > 32 && lane != 0) return;
    kept_number().log_sum = log_sum;
    kept_number().g = g;
  }
  // Overwrites the gradient of the number tokens' classes. For whole teams.
  __device__ __forceinline__ void number_gradient(const Slope& s, T* dx) {
    if constexpr (kTeam > 1 && kTeam <= 32) __syncwarp(team_mask<kTeam>());
    if constexpr (kTeam > 32) __syncthreads();  // after `write`, whose values are overwritten
    const Number& kept = kept_number();
    if (kept.weight == 0) return;
    const FirstToken first = kept.first[kTeam > 32 ? lane % kTokens : 0];
    const R m = product(s.top, unit.of_z);
    const R* distances = distances_of_label();
    for (int64_t k = lane; k < a.num_number_tokens; k += kTeam) {
      const int64_t j = a.number_ids[k];
      if (j < 0 || j >= a.n || (k && a.number_ids[k - 1] == j)) continue;
      const bool known = k < kTokens;
      const R z = known ? first.logit : logit_of_class(j), d = z - m, p = exp(d - kept.log_sum),
              e = exp(z - kept.term.top);
      R dz = j == t ? s.at_target : loss.grad(p, d, R(1), R(0), s.coef);
      dz += loss.number_tokens.self_term(kept.term, e, p, known ? first.distance : distances[k]) * kept.g;
      // a token may occur more than once: one thread adds all its terms
      for (int64_t same = k + 1; same < a.num_number_tokens && a.number_ids[same] == j; ++same)
        dz += loss.number_tokens.self_term(kept.term, e, p, distances[same]) * kept.g;
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
