// survival: the losses of cohorts [rows, n], see losses/survival.h, one for each individual or their sum, in
// float64. `state` is what backward needs.
#include <algorithm>
#include <tuple>

#include "../cpu/kernels/survival.h"
#include "runtime.h"

namespace fastloss {
namespace {

// Holds the tensors that `args` points into.
struct SurvivalCall {
  SurvivalArgs args{};
  Tensor score, log_time, events, order, group, stratum, partial, items;

  SurvivalCall(const Tensor& score_, const OptionalTensor& log_time_, const Tensor& events_,
               const Tensor& order_, const Tensor& group_, const OptionalTensor& stratum_, int64_t kind,
               bool efron, double alpha, double beta)
      : score(contiguous_as(score_, score_.scalar_type())),
        log_time(log_time_ ? contiguous_as(*log_time_, ScalarType::Double) : score),
        events(contiguous_as(events_, ScalarType::Bool)),
        order(contiguous_as(order_, ScalarType::Long)),
        group(contiguous_as(group_, ScalarType::Long)),
        stratum(stratum_ ? contiguous_as(*stratum_, ScalarType::Long) : group),
        partial(score),
        items(score) {
    FL_CHECK(score.dim() == 2, "score: expected two dimensions");
    for (const Tensor& t : {log_time, events, order, group, stratum})
      FL_CHECK(t.numel() == score.numel(), "expected as many numbers as scores");
    args.kind = enum_of<Survival>(kind, "kind");
    args.efron = efron;
    args.alpha = alpha;
    args.beta = beta;
    args.dtype = dtype_of(score, "score");
    args.rows = score.size(0);
    args.n = score.size(1);
    args.score = score.const_data_ptr();
    if (log_time_) args.log_time = static_cast<const double*>(log_time.const_data_ptr());
    args.events = static_cast<const uint8_t*>(events.const_data_ptr());
    args.order = static_cast<const int64_t*>(order.const_data_ptr());
    args.group = static_cast<const int64_t*>(group.const_data_ptr());
    if (stratum_) args.stratum = static_cast<const int64_t*>(stratum.const_data_ptr());
    partial = empty_doubles(args.rows * std::max<int64_t>(survival_tiles(args), 1));
    items = empty_doubles(on_cuda(score) ? args.rows * survival_tiles(args) * kSurvivalItem : 0);
    args.partial = static_cast<double*>(partial.mutable_data_ptr());
    args.items = static_cast<double*>(items.mutable_data_ptr());
  }
  Tensor empty_doubles(int64_t count) const {
    const int64_t shape[] = {count};
    return empty(score, shape, ScalarType::Double);
  }
  void run() const {
    if (on_cuda(score)) return launch_on_cuda(score, FASTLOSS_CUDA_FUNCTION(survival), args);
    const cpu::SurvivalKernel kernel = cpu::survival_kernel.best();
    const int64_t grain = std::max<int64_t>(1, 4096 / args.n);
    in_parallel(args.rows, grain, [&](int64_t b, int64_t e) { kernel(args, b, e); });
    if (!args.total) return;
    *args.total = 0;
    for (int64_t r = 0; r < args.rows; ++r) *args.total += args.partial[r];
  }
};

std::tuple<Tensor, Tensor> forward(Tensor score, OptionalTensor log_time, Tensor events, Tensor order,
                                   Tensor group, OptionalTensor stratum, int64_t kind, bool efron,
                                   double alpha, double beta, bool each) {
  SurvivalCall call(score, log_time, events, order, group, stratum, kind, efron, alpha, beta);
  SurvivalArgs& a = call.args;
  Tensor loss = empty(call.score, each ? call.score.sizes() : torch::headeronly::IntHeaderOnlyArrayRef(),
                      ScalarType::Double);
  const int64_t state_shape[] = {a.rows, a.n, a.state_width()};
  const Tensor state = empty(call.score, state_shape, ScalarType::Double);
  (each ? a.loss : a.total) = static_cast<double*>(loss.mutable_data_ptr());
  a.state = static_cast<double*>(state.mutable_data_ptr());
  if (a.rows * a.n == 0) {
    torch::stable::zero_(loss);
  } else {
    call.run();
  }
  return {loss, state};
}

Tensor backward(Tensor grad, Tensor score, OptionalTensor log_time, Tensor events, Tensor order, Tensor group,
                OptionalTensor stratum, Tensor state, int64_t kind, bool efron, double alpha, double beta,
                bool each) {
  SurvivalCall call(score, log_time, events, order, group, stratum, kind, efron, alpha, beta);
  SurvivalArgs& a = call.args;
  const Tensor g = contiguous_as(grad, ScalarType::Double);
  FL_CHECK(g.numel() == (each ? a.rows * a.n : 1), "grad: expected the shape of the loss");
  const Tensor gradient = empty_pooled(call.score, call.score.sizes(), call.score.scalar_type());
  const Tensor slope = call.empty_doubles(on_cuda(call.score) ? 2 * a.rows * a.n : 0);
  a.backward = true;
  a.each = each;
  a.upstream = static_cast<const double*>(g.const_data_ptr());
  a.state = static_cast<double*>(const_cast<void*>(state.const_data_ptr()));
  a.slope = static_cast<double*>(slope.mutable_data_ptr());
  a.gradient = gradient.mutable_data_ptr();
  if (a.rows * a.n > 0) call.run();
  return gradient;
}

#define FASTLOSS_SURVIVAL_TENSORS \
  "Tensor score, Tensor? log_time, Tensor events, Tensor order, Tensor group, Tensor? stratum"
#define FASTLOSS_SURVIVAL_OPTIONS "int kind, bool efron, float alpha, float beta, bool each"

void define(StableLibrary& m) {
  m.def("survival_fwd(" FASTLOSS_SURVIVAL_TENSORS ", " FASTLOSS_SURVIVAL_OPTIONS
        ") -> (Tensor loss, Tensor state)");
  m.def("survival_bwd(Tensor grad, " FASTLOSS_SURVIVAL_TENSORS ", Tensor state, " FASTLOSS_SURVIVAL_OPTIONS
        ") -> Tensor");
}
void implement(StableLibrary& m) {
  m.impl("survival_fwd", TORCH_BOX(&forward));
  m.impl("survival_bwd", TORCH_BOX(&backward));
}

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
