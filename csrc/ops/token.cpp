// The operators of the token losses. All share one schema, one set of checks and one way from tensors to
// RowArgs; a loss adds only its line in FASTLOSS_TOKEN_LOSSES.
#include <tuple>

#include "rows.h"

namespace fastloss {
namespace {

// ---- the operators

template <const TokenLoss& kLoss>
struct Ops {
  static std::tuple<Tensor, Tensor, Tensor> forward(Tensor input, Tensor target, OptionalTensor weight,
                                                    OptionalTensor row_weight, int64_t ignore_index,
                                                    int64_t reduction, double logit_scale, double softcap,
                                                    Options options, bool wide, bool with_gradient) {
    const RowPass pass = with_gradient ? RowPass::forward_gradient : RowPass::forward;
    Call call(kLoss, pass, input, target, weight, logit_scale, softcap, options);
    RowArgs& a = call.args;
    a.ignore_index = ignore_index;
    if (row_weight) {
      STD_TORCH_CHECK(row_weight->numel() == a.rows, "sample_weight: expected ", a.rows, " numbers, got ",
                      row_weight->numel());
      row_weight = as_type(*row_weight, call.accumulation);
      a.row_weight = row_weight->const_data_ptr();
    }
    if (!on_cuda(call.x)) check_targets(a);
    const int64_t width = kStateHead + kLoss.saved;
    const int64_t state_shape[] = {a.rows, width};
    const Tensor state = empty(call.x, state_shape, call.accumulation);
    Tensor loss = empty(call.x, call.row_shape, call.accumulation);
    const int64_t nothing[] = {0};
    const Tensor dx =
        with_gradient ? empty_like_pooled(call.x) : empty(call.x, nothing, call.x.scalar_type());
    call.set_state(state);
    a.loss = loss.mutable_data_ptr();
    if (with_gradient) call.set_gradient(dx);
    if (reduction == kNone) {
      run(kLoss, call);
    } else {
      loss = on_cuda(call.x) ? reduced_on_cuda(call, reduction) : reduced(call, reduction);
    }
    if (!wide) loss = call.as_dtype(loss);
    return {loss, state, dx};
  }

  // Runs the loss and adds its rows up.
  static Tensor reduced(Call& call, int64_t reduction) {
    if (call.args.dtype == DType::f64) return reduced_as<double>(call, reduction);
    return reduced_as<float>(call, reduction);
  }
  template <class R>
  static Tensor reduced_as(Call& call, int64_t reduction) {
    R norm;
    if (reduction == kMean) {
      norm = static_cast<R>(norm_of<R>(call.args));
      call.args.norm = &norm;
    }
    Tensor result = empty(call.x, {}, call.accumulation);
    run(kLoss, call);
    reduce(call.args, static_cast<R*>(result.mutable_data_ptr()));
    return result;
  }
  static Tensor reduced_on_cuda(Call& call, int64_t reduction) {
#if defined(FASTLOSS_HAS_CUDA)
    RowArgs& a = call.args;
    const int64_t two[] = {2};  // the result, the norm: where the kernels can read them
    Tensor numbers = empty(call.x, two, call.accumulation);
    char* result = static_cast<char*>(numbers.mutable_data_ptr());
    void* norm = result + (a.dtype == DType::f64 ? sizeof(double) : sizeof(float));
    if (reduction == kMean) a.norm = norm;
    const DeviceScope scope(call.x);
    void* stream = current_stream(call.x);
    if (a.norm) cuda::row_norm(a, norm, stream);
    if (a.rows) kLoss.cuda_kernel(a, stream);
    cuda::row_reduce(a, result, stream);
    return torch::stable::select(numbers, 0, 0);
#else
    run_cuda(kLoss, call);
#endif
  }

  static void write_gradient(Call& call, const Tensor& upstream, const Tensor& state, const Tensor& dx,
                             bool skip_unit) {
    RowArgs& a = call.args;
    const Tensor g = as_type(upstream, call.accumulation);
    STD_TORCH_CHECK(g.numel() == 1 || g.numel() == a.rows, "grad: expected 1 or ", a.rows, " numbers");
    a.upstream = g.const_data_ptr();
    a.upstream_stride = g.dim() == 0 || a.rows == 1 ? 0 : 1;
    a.skip_unit_upstream = skip_unit;
    call.set_state(state);
    call.set_gradient(dx);
    if (skip_unit && !on_cuda(call.x) && a.upstream_stride == 0) {
      const bool unit = a.dtype == DType::f64 ? *static_cast<const double*>(a.upstream) == 1
                                              : *static_cast<const float*>(a.upstream) == 1;
      if (unit) return;
    }
    run(kLoss, call);
  }

  // Row weights are in the state already; they stand in the schema because backward takes all of forward's
  // tensors.
  static Tensor backward(Tensor grad, Tensor input, Tensor target, OptionalTensor weight,
                         OptionalTensor /*row_weight*/, Tensor state, double logit_scale, double softcap,
                         Options options) {
    Call call(kLoss, RowPass::backward, input, target, weight, logit_scale, softcap, options);
    const Tensor dx = empty_like_pooled(call.x);
    write_gradient(call, grad, state, dx, false);
    return dx;
  }

  // Into dx: the buffer that the forward pass filled for an upstream gradient of 1 (then nothing is left to
  // do if it is 1), or the input's own memory.
  static void backward_into(Tensor grad, Tensor dx, Tensor input, Tensor target, OptionalTensor weight,
                            OptionalTensor /*row_weight*/, Tensor state, double logit_scale, double softcap,
                            Options options, bool skip_unit) {
    Call call(kLoss, RowPass::backward, input, target, weight, logit_scale, softcap, options);
    STD_TORCH_CHECK(
        row_layout(dx) && dx.numel() == call.x.numel() && dx.scalar_type() == call.x.scalar_type(),
        "dx: expected a tensor like input with rows of one stride");
    write_gradient(call, grad, state, dx, skip_unit);
  }
};

}  // namespace

#define FASTLOSS_DEFINE(name, Loss)                                                                         \
  m.def(#name                                                                                               \
        "_fwd(Tensor input, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, "          \
        "int reduction, float logit_scale, float softcap, float[] options, bool wide, bool with_gradient) " \
        "-> (Tensor loss, Tensor state, Tensor dx)");                                                       \
  m.def(#name                                                                                               \
        "_bwd(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor? row_weight, Tensor state, " \
        "float logit_scale, float softcap, float[] options) -> Tensor");                                    \
  m.def(#name                                                                                               \
        "_bwd_into(Tensor grad, Tensor(a!) dx, Tensor input, Tensor target, Tensor? weight, "               \
        "Tensor? row_weight, Tensor state, float logit_scale, float softcap, float[] options, bool "        \
        "skip_unit) -> ()");
#define FASTLOSS_IMPLEMENT(name, Loss)                          \
  m.impl(#name "_fwd", TORCH_BOX(&Ops<name##_loss>::forward));  \
  m.impl(#name "_bwd", TORCH_BOX(&Ops<name##_loss>::backward)); \
  m.impl(#name "_bwd_into", TORCH_BOX(&Ops<name##_loss>::backward_into));

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLOSS_NAMESPACE, m){
    FASTLOSS_TOKEN_LOSSES(FASTLOSS_DEFINE)} STABLE_TORCH_LIBRARY_IMPL(FASTLOSS_NAMESPACE, CPU, m){
    FASTLOSS_TOKEN_LOSSES(FASTLOSS_IMPLEMENT)}
#if !defined(FL_SIMT)
STABLE_TORCH_LIBRARY_IMPL(FASTLOSS_NAMESPACE, CUDA, m) {
  FASTLOSS_TOKEN_LOSSES(FASTLOSS_IMPLEMENT)
}
#endif

}  // namespace fastloss
