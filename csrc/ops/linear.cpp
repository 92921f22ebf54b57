// The parts of a row loss fused with its linear layer (fastloss/_ops/chunked_linear.py combines them, chunk
// by chunk): row losses on a chunk of logits in place, sums over rows, and on the CPU the GEMMs.
#include <tuple>

#include "../cpu/kernels/linear.h"
#include "row_ops.h"

namespace fastloss {
namespace {

// ---- the row losses in place

// loss[r] = row_weight[r] * (loss of the row) and, if requested, logits = gradient of sum loss[r] / norm.
template <const TokenLoss& kLoss>
void rows(Tensor logits, Tensor loss, Tensor target, OptionalTensor weight, OptionalTensor row_weight,
          OptionalTensor norm, int64_t ignore_index, double logit_scale, double softcap, Hparams hparams,
          bool with_gradient) {
  Call call(kLoss, with_gradient ? RowPass::forward_gradient : RowPass::forward, logits, target, weight,
            logit_scale, softcap, hparams);
  RowArgs& a = call.args;
  FL_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits: expected rows without gaps");
  FL_CHECK(loss.numel() == a.rows && loss.is_contiguous() && loss.scalar_type() == call.accumulation,
           "loss: expected ", a.rows, " numbers of the accumulation type");
  a.ignore_index = ignore_index;
  if (row_weight) {
    FL_CHECK(row_weight->numel() == a.rows, "row_weight: expected ", a.rows, " numbers");
    row_weight = contiguous_as(*row_weight, call.accumulation);
    a.row_weight = row_weight->const_data_ptr();
  }
  if (norm) {
    norm = contiguous_as(*norm, call.accumulation);
    a.norm = norm->const_data_ptr();
  }
  const int64_t state_shape[] = {a.rows, kStateHead + kLoss.saved};
  const Tensor state = empty(logits, state_shape, call.accumulation);
  call.set_state(state);
  a.loss = loss.mutable_data_ptr();
  if (with_gradient) call.set_gradient(logits);
  run(kLoss, call);
}

// ---- sums over all rows, in double and in their order

// Sum of row weight x class weight of the target over the rows that count, in the type of `loss`.
Tensor row_norm(Tensor loss, Tensor target, OptionalTensor weight, OptionalTensor row_weight,
                int64_t ignore_index) {
  RowArgs a{};
  const DType dtype = dtype_of(loss, "loss");
  a.dtype = dtype;
  a.rows = loss.numel();
  a.ignore_index = ignore_index;
  if (target.scalar_type() == ScalarType::Long) {
    target = contiguous_as(target, ScalarType::Long);
    a.target = static_cast<const int64_t*>(target.const_data_ptr());
  }
  if (weight) {
    weight = contiguous_as(*weight, loss.scalar_type());
    a.class_weight = weight->const_data_ptr();
    a.n = weight->numel();
  }
  if (row_weight) {
    row_weight = contiguous_as(*row_weight, loss.scalar_type());
    a.row_weight = row_weight->const_data_ptr();
  }
  const Tensor norm = empty(loss, {}, loss.scalar_type());
  if (on_cuda(loss)) {
    launch_on_cuda(loss, FASTLOSS_CUDA_FUNCTION(row_norm), a, norm.mutable_data_ptr());
  } else if (dtype == DType::f64) {
    *static_cast<double*>(norm.mutable_data_ptr()) = norm_of<double>(a);
  } else {
    *static_cast<float*>(norm.mutable_data_ptr()) = static_cast<float>(norm_of<float>(a));
  }
  return norm;
}

Tensor row_reduce(Tensor given, OptionalTensor norm) {
  const Tensor loss = contiguous_as(given, given.scalar_type());
  RowArgs a{};
  a.dtype = dtype_of(loss, "loss");
  a.rows = loss.numel();
  a.loss = const_cast<void*>(loss.const_data_ptr());
  a.norm = norm ? norm->const_data_ptr() : nullptr;
  const Tensor result = empty(loss, {}, loss.scalar_type());
  if (on_cuda(loss)) {
    launch_on_cuda(loss, FASTLOSS_CUDA_FUNCTION(row_reduce), a, result.mutable_data_ptr());
  } else if (a.dtype == DType::f64) {
    reduce(a, static_cast<double*>(result.mutable_data_ptr()));
  } else {
    reduce(a, static_cast<float*>(result.mutable_data_ptr()));
  }
  return result;
}

// An uninitialised tensor of the accumulation type of `like`; large ones on the CPU come from the pool
// (cpu/pool.h).
Tensor scratch(Tensor like, std::vector<int64_t> shape) {
  return empty_pooled(like, shape, accumulation_type(dtype_of(like, "input")));
}

// d *= factor, one number of the accumulation type. If it is 1, which the kernel checks, d is not read.
void linear_scale_(Tensor d, Tensor factor) {
  ScaleArgs a{};
  a.dtype = dtype_of(d, "d");
  FL_CHECK(d.is_contiguous(), "d: expected no gaps");
  FL_CHECK(factor.numel() == 1 && factor.scalar_type() == accumulation_type(a.dtype),
           "factor: expected one number of the accumulation type");
  a.n = d.numel();
  a.p = d.mutable_data_ptr();
  a.factor = factor.const_data_ptr();
  launch_on_cuda(d, FASTLOSS_CUDA_FUNCTION(scale), a);
}

#if !defined(FL_SIMT)

// ---- the products on the CPU

cpu::LinearArgs products(const Tensor& w, const Tensor& logits) {
  FL_CHECK(w.dim() == 2 && logits.dim() == 2 && logits.is_contiguous() && logits.size(1) == w.size(0),
           "logits: expected a row of ", w.size(0), " classes without gaps");
  cpu::LinearArgs a{};
  a.dtype = dtype_of(w, "linear_weight");
  FL_CHECK(logits.scalar_type() == accumulation_type(a.dtype), "logits: expected the accumulation type");
  a.rows = logits.size(0);
  a.n = w.size(0);
  a.features = w.size(1);
  a.w = w.const_data_ptr();
  a.w_row = w.stride(0);
  a.w_column = w.stride(1);
  a.logits = const_cast<void*>(logits.const_data_ptr());
  return a;
}
void check_chunk(const cpu::LinearArgs& a, const Tensor& t, const char* name) {
  FL_CHECK(
      t.is_contiguous() && t.numel() == a.rows * a.features && t.scalar_type() == accumulation_type(a.dtype),
      name, ": expected ", a.rows, " rows of ", a.features, " features of the accumulation type");
}
int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }
void run_tasks(cpu::LinearKernels::Kernel kernel, const cpu::LinearArgs& a, int64_t tasks) {
  in_parallel(tasks, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}
Tensor packing_workspace(cpu::LinearArgs& a, const Tensor& x) {
  check_chunk(a, x, "x");
  a.x = x.const_data_ptr();
  const int64_t number = x.element_size();
  const Tensor workspace = scratch(x, {blocks(cpu::best_linear_kernels().packed_bytes(a), number)});
  a.panels = workspace.mutable_data_ptr();
  return workspace;
}

// logits = x w^T + bias
void linear_logits(Tensor logits, Tensor x, Tensor w, OptionalTensor bias) {
  const cpu::LinearKernels& kernels = cpu::best_linear_kernels();
  cpu::LinearArgs a = products(w, logits);
  const Tensor workspace = packing_workspace(a, x);
  if (bias) {
    FL_CHECK(bias->numel() == a.n, "linear_bias: expected ", a.n, " numbers");
    bias = contiguous_as(*bias, logits.scalar_type());
    a.bias = bias->const_data_ptr();
  }
  run_tasks(kernels.pack_left, a, blocks(a.rows, cpu::kRowBlock));
  run_tasks(kernels.logits, a, blocks(a.n, cpu::kClassBlock));
}

// dx = g w
void linear_dx(Tensor dx, Tensor g, Tensor w) {
  cpu::LinearArgs a = products(w, g);
  check_chunk(a, dx, "dx");
  a.dx = dx.mutable_data_ptr();
  // a few tiles for each thread: the larger a tile, the smaller the part of packing
  const int64_t threads = torch::stable::get_num_threads();
  a.tile_rows = 2 * cpu::kRowBlock;
  a.tile_columns = 512;
  const auto tiles = [&] { return blocks(a.rows, a.tile_rows) * blocks(a.features, a.tile_columns); };
  while (tiles() < threads && a.tile_columns > 64) a.tile_columns /= 2;
  while (tiles() < threads && a.tile_rows > 48) a.tile_rows /= 2;
  run_tasks(cpu::best_linear_kernels().dx, a, tiles());
}

// dw (+)= g^T x, db (+)= sum over rows of g; either may be left out. w is not read.
void linear_dw(OptionalTensor dw, OptionalTensor db, Tensor g, Tensor x, Tensor w, bool add) {
  const cpu::LinearKernels& kernels = cpu::best_linear_kernels();
  cpu::LinearArgs a = products(w, g);
  const Tensor workspace = packing_workspace(a, x);
  if (dw) {
    FL_CHECK(dw->is_contiguous() && dw->numel() == a.n * a.features, "dw: expected no gaps");
    a.dw = dw->mutable_data_ptr();
    run_tasks(kernels.pack_right, a, blocks(a.rows, cpu::kRowBlock));
  }
  if (db) {
    FL_CHECK(db->numel() == a.n && db->is_contiguous(), "db: expected ", a.n, " numbers");
    a.db = db->mutable_data_ptr();
  }
  a.add = add;
  run_tasks(kernels.dw, a, blocks(a.n, cpu::kClassBlock));
}

// ---- the result: d is the gradient for an upstream gradient of 1, in the accumulation type

// factor * d in the type of `like`.
Tensor linear_scaled(Tensor d, Tensor factor, Tensor like) {
  const DType dtype = dtype_of(like, "like");
  FL_CHECK(d.is_contiguous() && accumulation_type(dtype) == d.scalar_type(), "d: expected no gaps");
  const double f = dtype == DType::f64 ? *static_cast<const double*>(factor.const_data_ptr())
                                       : *static_cast<const float*>(factor.const_data_ptr());
  const Tensor out = empty_pooled(d, d.sizes(), like.scalar_type());
  const void* from = d.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const auto kernel = cpu::best_linear_kernels().scale;
  in_parallel(d.numel(), 1 << 16,
              [&](int64_t begin, int64_t end) { kernel(from, f, dtype, to, begin, end); });
  return out;
}

#endif

#define FASTLOSS_DEFINE(name, Loss)                                                                     \
  m.def(#name                                                                                           \
        "_rows(Tensor(a!) logits, Tensor(b!) loss, Tensor target, Tensor? weight, Tensor? row_weight, " \
        "Tensor? norm, int ignore_index, float logit_scale, float softcap, float[] hparams, "           \
        "bool with_gradient) -> ()");
#define FASTLOSS_IMPLEMENT(name, Loss) m.impl(#name "_rows", TORCH_BOX(&rows<name##_loss>));

void define(StableLibrary& m) {
  FASTLOSS_TOKEN_LOSSES(FASTLOSS_DEFINE)
  m.def(
      "row_norm(Tensor loss, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index) -> Tensor");
  m.def("row_reduce(Tensor loss, Tensor? norm) -> Tensor");
  m.def("scratch(Tensor like, int[] shape) -> Tensor");
  m.def("linear_logits(Tensor(a!) logits, Tensor x, Tensor w, Tensor? bias) -> ()");
  m.def("linear_dx(Tensor(a!) dx, Tensor g, Tensor w) -> ()");
  m.def("linear_dw(Tensor(a!)? dw, Tensor(b!)? db, Tensor g, Tensor x, Tensor w, bool add) -> ()");
  m.def("linear_scaled(Tensor d, Tensor factor, Tensor like) -> Tensor");
  m.def("linear_scale_(Tensor(a!) d, Tensor factor) -> ()");
}
void implement(StableLibrary& m) {
  FASTLOSS_TOKEN_LOSSES(FASTLOSS_IMPLEMENT)
  m.impl("row_norm", TORCH_BOX(&row_norm));
  m.impl("row_reduce", TORCH_BOX(&row_reduce));
  m.impl("scratch", TORCH_BOX(&scratch));
}
#if !defined(FL_SIMT)
void implement_products(StableLibrary& m) {
  m.impl("linear_logits", TORCH_BOX(&linear_logits));
  m.impl("linear_dx", TORCH_BOX(&linear_dx));
  m.impl("linear_dw", TORCH_BOX(&linear_dw));
  m.impl("linear_scaled", TORCH_BOX(&linear_scaled));
}
#endif
void implement_scale(StableLibrary& m) { m.impl("linear_scale_", TORCH_BOX(&linear_scale_)); }

}  // namespace

FASTLOSS_OPERATORS(define, implement)
#if !defined(FL_SIMT)
FASTLOSS_CPU_OPERATORS(implement_products)
#endif
FASTLOSS_CUDA_OPERATORS(implement_scale)

}  // namespace fastloss
