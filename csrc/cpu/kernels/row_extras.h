// What only some losses compute of a row, besides its sums and the gradient of all classes: several outputs
// with the log-probabilities of the classes in `index` (losses/token_statistics.h), or the term of
// losses/number_token.h.
#pragma once
#include "row_reader.h"

namespace fastloss::inline FL_ISA {

template <class Loss, class T>
class RowExtras : protected RowReader<Loss, T> {
  using Base = RowReader<Loss, T>;

 protected:
  using Base::a_, Base::loss_, Base::scale_, Base::W, Base::logit, Base::logit_of_class, Base::slope;
  using Base::Base;
  using typename Base::R, typename Base::F, typename Base::Row;

  // ---- a loss with kOutputs
  FL_FN Outputs<R> outputs(int64_t r) const { return {static_cast<R*>(a_.loss) + r, a_.rows}; }
  FL_FN Outputs<const R> upstream(int64_t r) const {
    return {static_cast<const R*>(a_.upstream) + r, a_.rows};
  }
  FL_FN const int64_t* index(int64_t r) const { return a_.index + r * a_.num_index; }

  // The log-probabilities of the classes in `index`, and whether each is the most probable class.
  FL_NOINLINE void write_index_logps(const Row& row, int64_t r) const {
    const Outputs<R> out = outputs(r);
    for (int64_t i = 0, count = a_.num_index; i < count; ++i) {
      const R d = logit_of_class(row, index(r)[i]) - row.state.m;
      out[Loss::kOutputs + i] = d - row.state.log_sum;
      out[Loss::kOutputs + count + i] = d == 0;
    }
  }
  // Overwrites the gradient of the classes in `index`. A class may occur there more than once; each
  // occurrence writes the full sum.
  FL_NOINLINE void write_index_gradient(const Row& row, int64_t r, T* dx) const {
    const auto coef = loss_.grad_coef(row.state, upstream(r), a_.num_index, scale_);
    for (int64_t i = 0, count = a_.num_index; i < count; ++i) {
      const int64_t j = index(r)[i];
      R g = 0;
      for (int64_t other = 0; other < count; ++other)
        if (index(r)[other] == j) g += upstream(r)[Loss::kOutputs + other];
      const R z = logit_of_class(row, j), d = z - row.state.m;
      const R dz = loss_.grad_at_index(exp(d - row.state.log_sum), d, g * scale_, coef);
      store_one(dx + j, dz * (slope(fill<F>(widen(row.x[j])))[0] / scale_));
    }
  }

  // ---- a loss with kNumberTokens
  FL_FN const R* distances_of_label(int64_t r) const {
    return static_cast<const R*>(a_.number_table) + a_.number_position[r] * a_.num_number_tokens;
  }
  FL_FN F distances_part(const R* distance, int64_t k) const {
    return k + W <= a_.num_number_tokens ? load(distance + k)
                                         : load_part(distance + k, a_.num_number_tokens - k, R(0));
  }
  // The row's term of the loss; leaves in row.number what the gradient needs, in number_logits_ the logits.
  FL_NOINLINE R number_term(Row& row, int64_t r) const {
    const R weight = static_cast<const R*>(a_.number_weight)[r];
    if (weight == 0) return 0;
    const int64_t count = a_.num_number_tokens;
    const R* distance = distances_of_label(r);
    R top = -INFINITY, pivot = distance[0];
    for (int64_t k = 0; k < count; ++k) {
      number_logits_[k] = logit(fill<F>(widen(row.x[a_.number_ids[k]])))[0];
      if (number_logits_[k] > top) {
        top = number_logits_[k];
        pivot = distance[k];
      }
    }
    for (int64_t k = count; k % W; ++k) number_logits_[k] = -INFINITY;
    const R base = softmax_base(top);
    F total{}, rest{};
    for (int64_t k = 0; k < count; k += W) {
      const F e = exp(load(number_logits_ + k) - base);
      total += e;
      rest += e * (distances_part(distance, k) - pivot);
    }
    const R sum = horizontal_sum(total);
    row.number =
        loss_.number_tokens.term(weight, *static_cast<const R*>(a_.number_max_distance), pivot,
                                 horizontal_sum(rest) / sum, base, sum, row.state.m, row.state.log_sum);
    return row.number.value;
  }
  // Overwrites the gradient of the number tokens' classes: `coef` covers all classes, self_term is added for
  // these alone. `at_target` is the gradient of the target class.
  template <class GradCoef>
  FL_NOINLINE void number_gradient(const Row& row, int64_t r, T* dx, const GradCoef& coef, R g,
                                   R at_target) const {
    const int64_t count = a_.num_number_tokens, *ids = a_.number_ids;
    const R* distance = distances_of_label(r);
    for (int64_t k = 0; k < count; k += W) {
      const F z = load(number_logits_ + k), p = exp((z - row.state.m) - row.state.log_sum);
      store(number_dense_ + k, loss_.grad(p, F{}, F{}, F{}, coef));
      store(number_self_ + k, loss_.number_tokens.self_term(row.number, exp(z - row.number.top), p,
                                                            distances_part(distance, k)) *
                                  g);
    }
    for (int64_t k = 0; k < count;) {
      const int64_t j = ids[k];
      R dz = j == row.t ? at_target : number_dense_[k];
      for (; k < count && ids[k] == j; ++k) dz += number_self_[k];  // a class may occur more than once
      store_one(dx + j, dz);
    }
  }

  // Scratch, [num_number_tokens] padded to whole vectors: logits, gradient from coef, gradient from
  // self_term.
  R *number_logits_, *number_dense_, *number_self_;
};

}  // namespace fastloss::inline FL_ISA
