// The operator of the divergences between two tensors of logits [..., V]: one number for each row, or their
// weighted sum or mean, and the gradients of both, in the forward pass if requested. See
// losses/distillation.h.
#include <cmath>
#include <tuple>

#include "../cpu/kernels/distillation.h"
#include "row_ops.h"

namespace fastloss {
namespace {

struct Divergences {
  Tensor student, teacher;
  OptionalTensor weight;
  ScalarType accumulation;
  std::vector<int64_t> row_shape;
  DivergenceArgs args{};

  Divergences(RowPass pass, const Tensor& student_, const Tensor& teacher_, double logit_scale, double beta)
      : student(rows_of(student_)),
        teacher(rows_of(teacher_)),
        accumulation(accumulation_type(dtype_of(student, "student_logits"))) {
    FL_CHECK(teacher.scalar_type() == student.scalar_type() && teacher.dim() == student.dim(),
             "teacher_logits: expected the type and shape of student_logits");
    RowArgs& a = args.rows;
    a.pass = pass;
    a.dtype = dtype_of(student, "student_logits");
    a.n = student.size(-1);
    a.rows = 1;
    for (int64_t d = 0; d + 1 < student.dim(); ++d) {
      row_shape.push_back(student.size(d));
      a.rows *= student.size(d);
    }
    FL_CHECK(teacher.numel() == a.rows * a.n && teacher.size(-1) == a.n,
             "teacher_logits: expected the type and shape of student_logits");
    a.x = student.const_data_ptr();
    a.x_layout = *row_layout_last(student);
    a.q = teacher.const_data_ptr();
    a.q_layout = *row_layout_last(teacher);
    a.logit_scale = logit_scale;
    using H = LogitDivergence<double, kMixture>::H;
    a.hparams[H::beta] = beta;
    a.hparams[H::odds] = (1 - beta) / beta;
    a.hparams[H::log_p] = std::log(beta);
    a.hparams[H::log_q] = std::log1p(-beta);
    a.variant = divergence_kind(beta);
  }
  static Tensor rows_of(const Tensor& t) {
    const auto layout = row_layout_last(t);
    return layout && layout->class_stride == 1 ? t : torch::stable::contiguous(t);
  }
  Tensor gradient(bool wanted) const {
    const int64_t nothing[] = {0};
    return wanted ? empty_pooled(student, student.sizes(), student.scalar_type())
                  : empty(student, nothing, student.scalar_type());
  }
  void set_gradients(const Tensor& dx, const Tensor& dq) {
    RowArgs& a = args.rows;
    for (const Tensor* d : {&dx, &dq})
      FL_CHECK(d->numel() == 0 || (d->numel() == a.rows * a.n && d->is_contiguous() &&
                                   d->scalar_type() == student.scalar_type()),
               "gradient: expected a contiguous tensor like the logits");
    a.dx = dx.numel() ? dx.mutable_data_ptr() : nullptr;
    args.dq = dq.numel() ? dq.mutable_data_ptr() : nullptr;
    const int64_t row_bytes = a.n * student.element_size();
    a.past_cache = row_bytes >= kRowPastCache && row_bytes * a.rows > kPastCache;
  }
  void set_upstream(const Tensor& g, const Tensor& state, bool skip_unit) {
    RowArgs& a = args.rows;
    FL_CHECK(g.numel() == 1 || g.numel() == a.rows, "grad: expected 1 or ", a.rows, " numbers");
    a.upstream = g.const_data_ptr();
    a.upstream_stride = g.dim() == 0 || a.rows == 1 ? 0 : 1;
    a.skip_unit_upstream = skip_unit;
    a.state = const_cast<void*>(state.const_data_ptr());
  }
  void run() const {
    const RowArgs& a = args.rows;
    if (a.rows == 0) return;
    if (on_cuda(student)) return launch_on_cuda(student, FASTLOSS_CUDA_FUNCTION(divergence), args);
    const cpu::DivergenceKernel kernel = cpu::divergence_kernel.best();
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(a.n, 1));
    in_parallel(a.rows, grain, [&](int64_t b, int64_t e) { kernel(args, b, e); });
  }
  template <class R>
  Tensor reduced(Reduction reduction) {
    RowArgs& a = args.rows;
    const Tensor result = empty(student, {}, accumulation);
    R norm;
    if (reduction == Reduction::mean) {
      norm = static_cast<R>(norm_of<R>(a));
      a.norm = &norm;
    }
    run();
    reduce(a, static_cast<R*>(result.mutable_data_ptr()));
    return result;
  }
  Tensor reduced_on_cuda(Reduction reduction) {
    RowArgs& a = args.rows;
    const int64_t two[] = {2};  // the result and the norm, in memory of the kernels' device
    const Tensor totals = empty(student, two, accumulation);
    char* result = static_cast<char*>(totals.mutable_data_ptr());
    void* norm = result + (a.dtype == DType::f64 ? sizeof(double) : sizeof(float));
    if (reduction == Reduction::mean) a.norm = norm;
    const DeviceScope scope(student);
    if (a.norm) scope.launch(FASTLOSS_CUDA_FUNCTION(row_norm), a, norm);
    if (a.rows) scope.launch(FASTLOSS_CUDA_FUNCTION(divergence), args);
    scope.launch(FASTLOSS_CUDA_FUNCTION(row_reduce), a, result);
    return torch::stable::select(totals, 0, 0);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor student, Tensor teacher, OptionalTensor row_weight,
                                                   int64_t reduction, double logit_scale, double beta,
                                                   int64_t wanted, bool with_gradient) {
  Divergences call(with_gradient ? RowPass::forward_gradient : RowPass::forward, student, teacher,
                   logit_scale, beta);
  RowArgs& a = call.args.rows;
  if (row_weight) {
    FL_CHECK(row_weight->numel() == a.rows, "sample_weight: expected ", a.rows, " numbers, got ",
             row_weight->numel());
    call.weight = contiguous_as(*row_weight, call.accumulation);
    a.row_weight = call.weight->const_data_ptr();
  }
  const Reduction mode = enum_of<Reduction>(reduction, "reduction");
  const int64_t state_shape[] = {a.rows, kDivergenceState};
  const Tensor state = empty(call.student, state_shape, call.accumulation);
  Tensor loss = empty(call.student, call.row_shape, call.accumulation);
  const Tensor dx = call.gradient(with_gradient && (wanted & 1));
  const Tensor dq = call.gradient(with_gradient && (wanted & 2));
  a.state = state.mutable_data_ptr();
  a.loss = loss.mutable_data_ptr();
  call.set_gradients(dx, dq);
  if (mode == Reduction::none) {
    call.run();
  } else if (on_cuda(call.student)) {
    loss = call.reduced_on_cuda(mode);
  } else {
    loss = a.dtype == DType::f64 ? call.reduced<double>(mode) : call.reduced<float>(mode);
  }
  return {loss, state, dx, dq};
}

// Row weights are in the state already; they are in the schema as are all of forward's tensors.
std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor student, Tensor teacher,
                                    OptionalTensor /*row_weight*/, Tensor state, double logit_scale,
                                    double beta, int64_t wanted) {
  Divergences call(RowPass::backward, student, teacher, logit_scale, beta);
  const Tensor g = contiguous_as(grad, call.accumulation), dx = call.gradient(wanted & 1),
               dq = call.gradient(wanted & 2);
  call.set_gradients(dx, dq);
  call.set_upstream(g, state, false);
  call.run();
  return {dx, dq};
}

// Into the buffers that the forward pass filled for an upstream gradient of 1.
void backward_into(Tensor grad, Tensor dx, Tensor dq, Tensor student, Tensor teacher,
                   OptionalTensor /*row_weight*/, Tensor state, double logit_scale, double beta,
                   int64_t /*wanted*/, bool skip_unit) {
  Divergences call(RowPass::backward, student, teacher, logit_scale, beta);
  const Tensor g = contiguous_as(grad, call.accumulation);
  call.set_gradients(dx, dq);
  call.set_upstream(g, state, skip_unit);
  call.run();
}

void define(StableLibrary& m) {
  m.def(
      "divergence_fwd(Tensor student, Tensor teacher, Tensor? row_weight, int reduction, float logit_scale, "
      "float beta, int wanted, bool with_gradient) -> (Tensor loss, Tensor state, Tensor dx, Tensor dq)");
  m.def(
      "divergence_bwd(Tensor grad, Tensor student, Tensor teacher, Tensor? row_weight, Tensor state, "
      "float logit_scale, float beta, int wanted) -> (Tensor dx, Tensor dq)");
  m.def(
      "divergence_bwd_into(Tensor grad, Tensor(a!) dx, Tensor(b!) dq, Tensor student, Tensor teacher, "
      "Tensor? row_weight, Tensor state, float logit_scale, float beta, int wanted, bool skip_unit) -> ()");
}
void implement(StableLibrary& m) {
  m.impl("divergence_fwd", TORCH_BOX(&forward));
  m.impl("divergence_bwd", TORCH_BOX(&backward));
  m.impl("divergence_bwd_into", TORCH_BOX(&backward_into));
}

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
