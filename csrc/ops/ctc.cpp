// ctc: the loss of each sequence of input [T, N, C] with targets [N, L], see losses/ctc.h. Saved for
// backward are the alphas, and one or two numbers of each row.
#include <algorithm>
#include <tuple>

#include "../cpu/kernels/ctc.h"
#include "runtime.h"

namespace fastloss {
namespace {

// Holds the tensors that `args` points into.
struct AlignmentCall {
  AlignmentArgs args{};
  Tensor input, targets, input_lengths, target_lengths;
  ScalarType accumulation;

  AlignmentCall(const Tensor& input_, const Tensor& targets_, const Tensor& input_lengths_,
                const Tensor& target_lengths_, int64_t blank, bool from_logits, bool zero_infinity)
      : input(classes_lie_together(input_) ? input_ : torch::stable::contiguous(input_)),
        targets(contiguous_as(targets_, ScalarType::Long)),
        input_lengths(contiguous_as(input_lengths_, ScalarType::Long)),
        target_lengths(contiguous_as(target_lengths_, ScalarType::Long)),
        accumulation(accumulation_type(dtype_of(input_, "log_probs"))) {
    AlignmentArgs& a = args;
    FL_CHECK(input.dim() == 3, "log_probs: expected three dimensions");
    a.dtype = dtype_of(input, "log_probs");
    a.steps = input.size(0);
    a.batch = input.size(1);
    a.classes = input.size(2);
    a.blank = blank;
    a.from_logits = from_logits;
    a.zero_infinity = zero_infinity;
    FL_CHECK(blank >= 0 && blank < a.classes, "blank: expected a class in [0, ", a.classes, "), got ", blank);
    FL_CHECK(targets.dim() == 2 && targets.size(0) == a.batch, "targets: expected [", a.batch, ", L]");
    FL_CHECK(input_lengths.numel() == a.batch, "input_lengths: expected ", a.batch, " numbers");
    FL_CHECK(target_lengths.numel() == a.batch, "target_lengths: expected ", a.batch, " numbers");
    a.width = targets.size(1);
    a.input = input.const_data_ptr();
    a.input_strides[0] = input.stride(0);
    a.input_strides[1] = input.stride(1);
    a.targets = static_cast<const int64_t*>(targets.const_data_ptr());
    a.input_lengths = static_cast<const int64_t*>(input_lengths.const_data_ptr());
    a.target_lengths = static_cast<const int64_t*>(target_lengths.const_data_ptr());
    if (!on_cuda(input)) check();
  }
  // As in batch-first logits that are transposed: such an input is read where it is.
  static bool classes_lie_together(const Tensor& t) {
    return t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1);
  }
  void check() const {
    for (int64_t n = 0; n < args.batch; ++n) {
      const int64_t t = args.input_lengths[n], l = args.target_lengths[n];
      FL_CHECK(t >= 0 && t <= args.steps, "input_lengths: expected numbers in [0, ", args.steps, "], got ",
               t);
      FL_CHECK(l >= 0 && l <= args.width, "target_lengths: expected numbers in [0, ", args.width,
               "], the width of targets, got ", l);
      for (int64_t i = 0; i < l; ++i) {
        const int64_t k = args.targets[n * args.width + i];
        FL_CHECK(k >= 0 && k < args.classes, "targets: expected classes in [0, ", args.classes, "), got ", k);
      }
    }
  }
  Tensor scratch(std::initializer_list<int64_t> shape, ScalarType type) const {
    return empty(input, {shape.begin(), shape.size()}, type);
  }
  void run() const {
    if (args.batch == 0) return;
    if (on_cuda(input)) return launch_on_cuda(input, FASTLOSS_CUDA_FUNCTION(alignment), args);
    const cpu::AlignmentKernel kernel = cpu::alignment_kernel.best();
    in_parallel(args.batch, 1, [&](int64_t b, int64_t e) { kernel(args, b, e); });
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor input, Tensor targets, Tensor input_lengths,
                                           Tensor target_lengths, int64_t blank, bool from_logits,
                                           bool zero_infinity) {
  AlignmentCall call(input, targets, input_lengths, target_lengths, blank, from_logits, zero_infinity);
  AlignmentArgs& a = call.args;
  const Tensor loss = call.scratch({a.batch}, call.accumulation);
  // 0 at steps and positions that a sequence does not have
  Tensor alpha = call.scratch({a.batch, a.steps, 2 * a.width + 1}, call.accumulation);
  Tensor rows = call.scratch({from_logits ? 2 : 1, a.steps, a.batch}, call.accumulation);
  torch::stable::zero_(alpha);
  torch::stable::zero_(rows);
  a.loss = loss.mutable_data_ptr();
  a.alpha = alpha.mutable_data_ptr();
  a.rows = rows.mutable_data_ptr();
  call.run();
  return {loss, alpha, rows};
}

Tensor backward(Tensor grad, Tensor input, Tensor targets, Tensor input_lengths, Tensor target_lengths,
                Tensor alpha, Tensor rows, int64_t blank, bool from_logits, bool zero_infinity) {
  AlignmentCall call(input, targets, input_lengths, target_lengths, blank, from_logits, zero_infinity);
  AlignmentArgs& a = call.args;
  const Tensor g = contiguous_as(grad, call.accumulation);
  FL_CHECK(g.numel() == a.batch, "grad: expected a number for each sequence");
  const int64_t width = on_cuda(call.input) ? 2 * a.width + 1 : 0;
  const Tensor posterior = call.scratch({a.batch, a.steps, width}, call.accumulation);
  const Tensor betas = call.scratch({a.batch, 2, width}, call.accumulation);
  const Tensor links = call.scratch({a.batch, width}, ScalarType::Long);
  Tensor gradient = empty_like_pooled(call.input);
  if (!call.classes_lie_together(gradient))
    gradient = empty_pooled(call.input, call.input.sizes(), call.input.scalar_type());
  a.gradient_strides[0] = gradient.stride(0);
  a.gradient_strides[1] = gradient.stride(1);
  a.backward = true;
  a.upstream = g.const_data_ptr();
  a.alpha = const_cast<void*>(alpha.const_data_ptr());
  a.rows = const_cast<void*>(rows.const_data_ptr());
  a.posterior = posterior.mutable_data_ptr();
  a.betas = betas.mutable_data_ptr();
  a.links = static_cast<int64_t*>(links.mutable_data_ptr());
  a.gradient = gradient.mutable_data_ptr();
  call.run();
  return gradient;
}

#define FASTLOSS_CTC_TENSORS "Tensor input, Tensor targets, Tensor input_lengths, Tensor target_lengths"
#define FASTLOSS_CTC_OPTIONS "int blank, bool from_logits, bool zero_infinity"

void define(StableLibrary& m) {
  m.def("ctc_fwd(" FASTLOSS_CTC_TENSORS ", " FASTLOSS_CTC_OPTIONS
        ") -> (Tensor loss, Tensor alpha, Tensor rows)");
  m.def("ctc_bwd(Tensor grad, " FASTLOSS_CTC_TENSORS ", Tensor alpha, Tensor rows, " FASTLOSS_CTC_OPTIONS
        ") -> Tensor");
}
void implement(StableLibrary& m) {
  m.impl("ctc_fwd", TORCH_BOX(&forward));
  m.impl("ctc_bwd", TORCH_BOX(&backward));
}

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
