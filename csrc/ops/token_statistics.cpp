// token_stats: several statistics of every row of logits [..., V], and log-probabilities of the classes
// `index` [..., K]. The outputs are [4 + 2 K, ...], see losses/token_statistics.h.
#include <tuple>

#include "row_ops.h"

namespace fastloss {
namespace {

struct Stats {
  Tensor x;
  OptionalTensor index, mask;
  ScalarType accumulation;
  RowArgs args{};

  Stats(RowPass pass, const Tensor& logits, const OptionalTensor& index_, double logit_scale, double softcap,
        bool all)
      : x(row_layout_last(logits) ? logits : torch::stable::contiguous(logits)),
        accumulation(accumulation_type(dtype_of(logits, "logits"))) {
    args.pass = pass;
    args.dtype = dtype_of(x, "logits");
    args.n = x.size(-1);
    args.rows = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) args.rows *= x.size(d);
    args.x = x.const_data_ptr();
    args.x_layout = *row_layout_last(x);
    args.logit_scale = logit_scale;
    args.softcap = softcap;
    args.hparams[TokenStats<float, 0>::H::all] = all;
    args.variant = all;
    if (index_) {
      index = contiguous_as(*index_, ScalarType::Long);
      args.index = static_cast<const int64_t*>(index->const_data_ptr());
      args.num_index = index->size(-1);
      FL_CHECK(index->numel() == args.rows * args.num_index, "index: expected K classes for each of ",
               args.rows, " rows");
    }
    args.num_outputs = TokenStats<float, 0>::kOutputs + 2 * args.num_index;
  }
  void run() const {
    if (args.rows == 0) return;
    if (on_cuda(x)) return launch_on_cuda(x, FASTLOSS_CUDA_FUNCTION(token_stats), args);
    const cpu::RowKernels::Kernel kernel = cpu::row_kernels.best().token_stats;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(args.n, 1));
    in_parallel(args.rows, grain, [&](int64_t b, int64_t e) { kernel(args, b, e); });
  }
};

std::tuple<Tensor, Tensor> forward(Tensor logits, OptionalTensor index, OptionalTensor mask,
                                   double logit_scale, double softcap, bool all) {
  Stats s(RowPass::forward, logits, index, logit_scale, softcap, all);
  RowArgs& a = s.args;
  if (mask) {
    FL_CHECK(mask->numel() == a.rows, "mask: expected one number for each of ", a.rows, " rows");
    s.mask = contiguous_as(*mask, s.accumulation);
    a.row_weight = s.mask->const_data_ptr();
  }
  if (!on_cuda(s.x) && s.index)
    for (int64_t r = 0; r < a.rows * a.num_index; ++r)
      FL_CHECK_INDEX(a.index[r] >= 0 && a.index[r] < a.n, "index ", a.index[r],
                     " is out of bounds: expected a class in [0, ", a.n, ")");
  std::vector<int64_t> shape{a.num_outputs};
  for (int64_t d = 0; d + 1 < s.x.dim(); ++d) shape.push_back(s.x.size(d));
  const int64_t state_shape[] = {a.rows, kStateHead + token_stats_loss.saved};
  Tensor outputs = empty(s.x, shape, s.accumulation);
  Tensor state = empty(s.x, state_shape, s.accumulation);
  a.loss = outputs.mutable_data_ptr();
  a.state = state.mutable_data_ptr();
  a.state_width = state_shape[1];
  s.run();
  return {outputs, state};
}

// The mask is in the state already; it stands in the schema because backward takes all of forward's tensors.
Tensor backward(Tensor grad, Tensor logits, OptionalTensor index, OptionalTensor /*mask*/, Tensor state,
                double logit_scale, double softcap, bool all) {
  Stats s(RowPass::backward, logits, index, logit_scale, softcap, all);
  RowArgs& a = s.args;
  const Tensor g = contiguous_as(grad, s.accumulation);
  FL_CHECK(g.numel() == a.num_outputs * a.rows, "grad: expected ", a.num_outputs, " numbers for each row");
  const Tensor dx = empty_like_pooled(s.x);
  a.upstream = g.const_data_ptr();
  a.state = const_cast<void*>(state.const_data_ptr());
  a.state_width = state.size(-1);
  a.dx = dx.mutable_data_ptr();
  a.dx_layout = *row_layout_last(dx);
  const int64_t row_bytes = a.n * dx.element_size();
  a.past_cache = row_bytes >= kRowPastCache && row_bytes * a.rows > kPastCache;
  s.run();
  return dx;
}

void define(StableLibrary& m) {
  m.def(
      "token_stats_fwd(Tensor logits, Tensor? index, Tensor? mask, float logit_scale, float softcap, bool "
      "all) "
      "-> (Tensor outputs, Tensor state)");
  m.def(
      "token_stats_bwd(Tensor grad, Tensor logits, Tensor? index, Tensor? mask, Tensor state, "
      "float logit_scale, float softcap, bool all) -> Tensor");
}
void implement(StableLibrary& m) {
  m.impl("token_stats_fwd", TORCH_BOX(&forward));
  m.impl("token_stats_bwd", TORCH_BOX(&backward));
}

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
