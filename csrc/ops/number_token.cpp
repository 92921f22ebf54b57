// Cross-entropy with a term for labels that are numbers, see losses/number_token.h: the operator of the token
// losses (ops/classification.cpp) with the number tokens `ids` (ascending), their table of distances and the
// largest one, and for every row its label's place among them and its term's weight, 0 where it is no number.
#include "row_ops.h"

namespace fastloss {
namespace {

struct NumberTokenInputs {
  Tensor ids, table, max_distance, position, weight;

  NumberTokenInputs(Call& call, const Tensor& ids_, const Tensor& table_, const Tensor& max_distance_,
                    const Tensor& position_, const Tensor& weight_)
      : ids(contiguous_as(ids_, ScalarType::Long)),
        table(contiguous_as(table_, call.accumulation)),
        max_distance(contiguous_as(max_distance_, call.accumulation)),
        position(contiguous_as(position_, ScalarType::Long)),
        weight(contiguous_as(weight_, call.accumulation)) {
    RowArgs& a = call.args;
    a.num_number_tokens = ids.numel();
    FL_CHECK(table.numel() == a.num_number_tokens * a.num_number_tokens && max_distance.numel() == 1,
             "token_values: expected one for each token");
    FL_CHECK(position.numel() == a.rows && weight.numel() == a.rows, "labels: expected ", a.rows);
    a.number_ids = static_cast<const int64_t*>(ids.const_data_ptr());
    a.number_table = table.const_data_ptr();
    a.number_max_distance = max_distance.const_data_ptr();
    a.number_position = static_cast<const int64_t*>(position.const_data_ptr());
    a.number_weight = weight.const_data_ptr();
    if (on_cuda(call.x)) return;
    for (int64_t k = 0; k < a.num_number_tokens; ++k)
      FL_CHECK_INDEX(a.number_ids[k] >= 0 && a.number_ids[k] < a.n, "token_ids ", a.number_ids[k],
                     " is out of bounds: expected a class in [0, ", a.n, ")");
  }
};

constexpr const TokenLoss& kLoss = cross_entropy_numbers_loss;

std::tuple<Tensor, Tensor, Tensor> forward(Tensor input, Tensor target, Tensor ids, Tensor table,
                                           Tensor max_distance, Tensor position, Tensor number_weight,
                                           int64_t ignore_index, int64_t reduction, Hparams hparams,
                                           bool out_fp32, bool with_gradient) {
  Call call(kLoss, with_gradient ? RowPass::forward_gradient : RowPass::forward, input, target, std::nullopt,
            1, 0, hparams);
  const NumberTokenInputs inputs(call, ids, table, max_distance, position, number_weight);
  call.args.ignore_index = ignore_index;
  return forward_results(kLoss, call, enum_of<Reduction>(reduction, "reduction"), out_fp32);
}

void backward_into(Tensor grad, Tensor dx, Tensor input, Tensor target, Tensor ids, Tensor table,
                   Tensor max_distance, Tensor position, Tensor number_weight, Tensor state, Hparams hparams,
                   bool skip_unit) {
  Call call(kLoss, RowPass::backward, input, target, std::nullopt, 1, 0, hparams);
  const NumberTokenInputs inputs(call, ids, table, max_distance, position, number_weight);
  FL_CHECK(row_layout(dx) && dx.numel() == call.x.numel() && dx.scalar_type() == call.x.scalar_type(),
           "dx: expected a tensor like input with rows of one stride");
  write_gradient(kLoss, call, grad, state, dx, skip_unit);
}
Tensor backward(Tensor grad, Tensor input, Tensor target, Tensor ids, Tensor table, Tensor max_distance,
                Tensor position, Tensor number_weight, Tensor state, Hparams hparams) {
  const Tensor dx = empty_like_pooled(as_rows(input));
  backward_into(grad, dx, input, target, ids, table, max_distance, position, number_weight, state, hparams,
                false);
  return dx;
}

void define(StableLibrary& m) {
  m.def(
      "cross_entropy_numbers_fwd(Tensor input, Tensor target, Tensor ids, Tensor table, Tensor max_distance, "
      "Tensor position, Tensor number_weight, int ignore_index, int reduction, float[] hparams, bool wide, "
      "bool with_gradient) -> (Tensor loss, Tensor state, Tensor dx)");
  m.def(
      "cross_entropy_numbers_bwd(Tensor grad, Tensor input, Tensor target, Tensor ids, Tensor table, "
      "Tensor max_distance, Tensor position, Tensor number_weight, Tensor state, float[] hparams) -> Tensor");
  m.def(
      "cross_entropy_numbers_bwd_into(Tensor grad, Tensor(a!) dx, Tensor input, Tensor target, Tensor ids, "
      "Tensor table, Tensor max_distance, Tensor position, Tensor number_weight, Tensor state, float[] "
      "hparams, "
      "bool skip_unit) -> ()");
}
void implement(StableLibrary& m) {
  m.impl("cross_entropy_numbers_fwd", TORCH_BOX(&forward));
  m.impl("cross_entropy_numbers_bwd", TORCH_BOX(&backward));
  m.impl("cross_entropy_numbers_bwd_into", TORCH_BOX(&backward_into));
}

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
