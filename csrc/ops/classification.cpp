// The operators of the token losses. All share one schema, one set of checks and one way from tensors to
// RowArgs; a loss adds only its line in FASTLOSS_TOKEN_LOSSES.
#include "row_ops.h"

namespace fastloss {
namespace {

// ---- the operators

template <const TokenLoss& kLoss>
struct Ops {
  static std::tuple<Tensor, Tensor, Tensor> forward(Tensor input, Tensor target, OptionalTensor weight,
                                                    OptionalTensor row_weight, int64_t ignore_index,
                                                    int64_t reduction, double logit_scale, double softcap,
                                                    Hparams hparams, bool out_fp32, bool with_gradient) {
    const RowPass pass = with_gradient ? RowPass::forward_gradient : RowPass::forward;
    Call call(kLoss, pass, input, target, weight, logit_scale, softcap, hparams);
    RowArgs& a = call.args;
    a.ignore_index = ignore_index;
    if (row_weight) {
      FL_CHECK(row_weight->numel() == a.rows, "sample_weight: expected ", a.rows, " numbers, got ",
               row_weight->numel());
      row_weight = contiguous_as(*row_weight, call.accumulation);
      a.row_weight = row_weight->const_data_ptr();
    }
    return forward_results(kLoss, call, enum_of<Reduction>(reduction, "reduction"), out_fp32);
  }

  // Row weights are in the state already; they are in the schema as are all of forward's tensors.
  static Tensor backward(Tensor grad, Tensor input, Tensor target, OptionalTensor weight,
                         OptionalTensor /*row_weight*/, Tensor state, double logit_scale, double softcap,
                         Hparams hparams) {
    Call call(kLoss, RowPass::backward, input, target, weight, logit_scale, softcap, hparams);
    const Tensor dx = empty_like_pooled(call.x);
    write_gradient(kLoss, call, grad, state, dx, false);
    return dx;
  }

  // Into dx: the buffer that the forward pass filled for an upstream gradient of 1 (then nothing is left to
  // do if it is 1), or the input's own memory.
  static void backward_into(Tensor grad, Tensor dx, Tensor input, Tensor target, OptionalTensor weight,
                            OptionalTensor /*row_weight*/, Tensor state, double logit_scale, double softcap,
                            Hparams hparams, bool skip_unit) {
    Call call(kLoss, RowPass::backward, input, target, weight, logit_scale, softcap, hparams);
    FL_CHECK(row_layout(dx) && dx.numel() == call.x.numel() && dx.scalar_type() == call.x.scalar_type(),
             "dx: expected a tensor like input with rows of one stride");
    write_gradient(kLoss, call, grad, state, dx, skip_unit);
  }
};

#define FASTLOSS_DEFINE(name, Loss)                                                                         \
  m.def(#name                                                                                               \
        "_fwd(Tensor input, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, "          \
        "int reduction, float logit_scale, float softcap, float[] hparams, bool wide, bool with_gradient) " \
        "-> (Tensor loss, Tensor state, Tensor dx)");                                                       \
  m.def(#name                                                                                               \
        "_bwd(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor? row_weight, Tensor state, " \
        "float logit_scale, float softcap, float[] hparams) -> Tensor");                                    \
  m.def(#name                                                                                               \
        "_bwd_into(Tensor grad, Tensor(a!) dx, Tensor input, Tensor target, Tensor? weight, "               \
        "Tensor? row_weight, Tensor state, float logit_scale, float softcap, float[] hparams, bool "        \
        "skip_unit) -> ()");
#define FASTLOSS_IMPLEMENT(name, Loss)                          \
  m.impl(#name "_fwd", TORCH_BOX(&Ops<name##_loss>::forward));  \
  m.impl(#name "_bwd", TORCH_BOX(&Ops<name##_loss>::backward)); \
  m.impl(#name "_bwd_into", TORCH_BOX(&Ops<name##_loss>::backward_into));

void define(StableLibrary& m) { FASTLOSS_TOKEN_LOSSES(FASTLOSS_DEFINE) }
void implement(StableLibrary& m) { FASTLOSS_TOKEN_LOSSES(FASTLOSS_IMPLEMENT) }

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
