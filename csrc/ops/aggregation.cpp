// aggregate: losses [n] reduced to one number, see losses/aggregation.h. `state` is what backward needs.
#include <tuple>

#include "../cpu/kernels/aggregation.h"
#include "runtime.h"

namespace fastloss {
namespace {

struct AggregateCall {
  AggregateArgs args{};
  Tensor losses;
  OptionalTensor theta, weight;
  ScalarType accumulation;

  AggregateCall(const Tensor& losses_, const OptionalTensor& theta_, const OptionalTensor& weight_,
                int64_t kind, double number, double eta, double flood)
      : losses(contiguous_as(losses_, losses_.scalar_type())),
        accumulation(accumulation_type(dtype_of(losses_, "losses"))) {
    FL_CHECK(losses.dim() == 1, "losses: expected one dimension");
    args.kind = enum_of<Aggregate>(kind, "kind");
    args.dtype = dtype_of(losses, "losses");
    args.n = losses.numel();
    args.losses = losses.const_data_ptr();
    args.number = number;
    args.eta = eta;
    args.flood = flood;
    plan_passes(args);
    if (theta_) {
      theta = contiguous_as(*theta_, accumulation);
      FL_CHECK(theta->numel() == 1, "theta: expected one number");
      args.theta = theta->const_data_ptr();
    }
    if (weight_) {
      weight = contiguous_as(*weight_, accumulation);
      FL_CHECK(weight->dim() == 1 && weight->numel() == args.n, "weight: expected one number for each loss");
      args.weight = weight->const_data_ptr();
    }
  }
  int64_t cpu_parts() const { return (args.n + cpu::kAggregatePart - 1) / cpu::kAggregatePart; }

  void forward() {
    const bool gpu = on_cuda(losses);
    args.partials = gpu ? call_cuda(FASTLOSS_CUDA_FUNCTION(aggregate_partials), args.n) : cpu_parts();
    const int64_t shape[] = {kMaxSums + kMaxTops, args.partials};
    const Tensor partial = empty(losses, shape, ScalarType::Double);
    args.partial = static_cast<double*>(partial.mutable_data_ptr());
    if (gpu) return launch_on_cuda(losses, FASTLOSS_CUDA_FUNCTION(aggregate), args);
    const cpu::AggregateKernels& kernels = cpu::aggregate_kernels.best();
    for (int i = 0; i < args.passes; ++i) {
      const AggregatePass pass = args.plan[i];
      in_parallel(args.partials, 1, [&](int64_t begin, int64_t end) { kernels.sum(args, pass, begin, end); });
      kernels.finish(args, pass);
    }
  }
  void backward() {
    if (on_cuda(losses)) return launch_on_cuda(losses, FASTLOSS_CUDA_FUNCTION(aggregate_gradient), args);
    const cpu::AggregateKernels& kernels = cpu::aggregate_kernels.best();
    if (args.n == 0) return kernels.gradient(args, 0, 0);
    in_parallel(cpu_parts(), 1, [&](int64_t begin, int64_t end) { kernels.gradient(args, begin, end); });
  }
};

std::tuple<Tensor, Tensor> forward(Tensor losses, OptionalTensor theta, OptionalTensor weight, int64_t kind,
                                   double number, double eta, double flood) {
  AggregateCall call(losses, theta, weight, kind, number, eta, flood);
  const int64_t numbers[] = {kStateNumbers};
  const Tensor value = empty(call.losses, {}, call.accumulation);
  const Tensor state = empty(call.losses, numbers, ScalarType::Double);
  call.args.value = value.mutable_data_ptr();
  call.args.state = static_cast<AggregateState*>(state.mutable_data_ptr());
  call.forward();
  return {value, state};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor losses, OptionalTensor theta, OptionalTensor weight,
                                    Tensor state, int64_t kind, double number, double eta, double flood) {
  AggregateCall call(losses, theta, weight, kind, number, eta, flood);
  const Tensor g = contiguous_as(grad, call.accumulation);
  FL_CHECK(g.numel() == 1, "grad: expected one number");
  const int64_t nothing[] = {0};
  const Tensor gradient = empty_pooled(call.losses, call.losses.sizes(), call.losses.scalar_type());
  const Tensor theta_gradient = theta ? empty(call.losses, theta->sizes(), call.accumulation)
                                      : empty(call.losses, nothing, call.losses.scalar_type());
  call.args.upstream = g.const_data_ptr();
  call.args.state = static_cast<AggregateState*>(const_cast<void*>(state.const_data_ptr()));
  call.args.gradient = gradient.mutable_data_ptr();
  call.args.theta_gradient = theta ? theta_gradient.mutable_data_ptr() : nullptr;
  call.backward();
  return {gradient, theta_gradient};
}

void define(StableLibrary& m) {
  m.def(
      "aggregate_fwd(Tensor losses, Tensor? theta, Tensor? weight, int kind, float number, float eta, float "
      "flood) -> (Tensor value, Tensor state)");
  m.def(
      "aggregate_bwd(Tensor grad, Tensor losses, Tensor? theta, Tensor? weight, Tensor state, int kind, "
      "float "
      "number, float eta, float flood) -> (Tensor dlosses, Tensor dtheta)");
}
void implement(StableLibrary& m) {
  m.impl("aggregate_fwd", TORCH_BOX(&forward));
  m.impl("aggregate_bwd", TORCH_BOX(&backward));
}

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
