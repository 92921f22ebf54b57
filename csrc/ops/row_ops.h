// What all operators of the row kernels share: from tensors to RowArgs, CPU or CUDA, reductions over rows.
#pragma once
#include <algorithm>
#include <tuple>

#include "../cpu/kernels/tables.h"
#include "runtime.h"

namespace fastloss {

// Gradients of shorter rows, in bytes, never use streaming stores.
constexpr int64_t kRowPastCache = 2048;

struct TokenLoss {
  int (*variant)(const RowArgs&);
  int saved, hparams;
  bool norm_counts_rows;
  cpu::RowKernels::Kernel cpu::RowKernels::* cpu_kernel;
  void (*cuda_kernel)(const RowArgs&, void* stream);
};

// ---- tensors as rows

// [N, C, d1, ...] or [C]; nullopt where the trailing dimensions have no common stride.
inline std::optional<RowLayout> row_layout(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  if (t.dim() == 1) return RowLayout{1, 0, 0, strides[0]};
  RowLayout l{1, strides[0], 0, strides[1]};
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (sizes[d] == 1) continue;
    if (l.inner == 1) {
      l.inner_stride = strides[d];
    } else if (strides[d] != l.inner_stride * l.inner) {
      return std::nullopt;
    }
    l.inner *= sizes[d];
  }
  return l;
}
// The same with the classes in the last dimension, [..., C].
inline std::optional<RowLayout> row_layout_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t classes = t.dim() - 1;
  int64_t count[2] = {1, 1}, stride[2] = {0, 0};  // of the inner and the outer rows
  int level = 0;
  for (int64_t d = classes - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (count[level] > 1 && strides[d] != stride[level] * count[level] && ++level > 1) return std::nullopt;
    if (count[level] == 1) stride[level] = strides[d];
    count[level] *= sizes[d];
  }
  if (level == 0) return RowLayout{1, stride[0], 0, strides[classes]};
  return RowLayout{count[0], stride[1], stride[0], strides[classes]};
}
inline Tensor as_rows(const Tensor& t) { return row_layout(t) ? t : torch::stable::contiguous(t); }

// The arguments that forward and backward share; owns the tensors that `args` points into.
struct Call {
  RowArgs args{};
  Tensor x, target;
  OptionalTensor weight;
  ScalarType accumulation;
  std::vector<int64_t> row_shape;

  Call(const TokenLoss& loss, RowPass pass, const Tensor& input, const Tensor& target_,
       const OptionalTensor& weight_, double logit_scale, double softcap, const Hparams& hparams)
      : x(as_rows(input)), target(target_), accumulation(accumulation_type(dtype_of(input, "input"))) {
    FL_CHECK(input.dim() >= 1, "input: expected at least one dimension");
    const auto sizes = x.sizes();
    const int64_t class_dim = x.dim() == 1 ? 0 : 1;
    for (int64_t d = 0; d < x.dim(); ++d)
      if (d != class_dim) row_shape.push_back(sizes[d]);
    args.pass = pass;
    args.dtype = dtype_of(x, "input");
    args.n = sizes[class_dim];
    args.rows = 1;
    for (int64_t size : row_shape) args.rows *= size;
    args.x = x.const_data_ptr();
    args.x_layout = *row_layout(x);
    if (target.scalar_type() == ScalarType::Long) {
      FL_CHECK(target.numel() == args.rows, "target: expected ", args.rows, " class indices, got ",
               target.numel());
      target = contiguous_as(target, ScalarType::Long);
      args.target = static_cast<const int64_t*>(target.const_data_ptr());
    } else {
      FL_CHECK(target.numel() == x.numel(), "target: expected a probability for each class");
      target = as_rows(as_dtype(target));
      args.q = target.const_data_ptr();
      args.q_layout = *row_layout(target);
    }
    if (weight_) {
      FL_CHECK(weight_->numel() == args.n, "weight: expected ", args.n, " numbers, got ", weight_->numel());
      weight = contiguous_as(*weight_, accumulation);
      args.class_weight = weight->const_data_ptr();
    }
    args.logit_scale = logit_scale;
    args.softcap = softcap;
    check_hparams(hparams, loss.hparams);
    std::copy(hparams.begin(), hparams.end(), args.hparams);
    args.norm_counts_rows = loss.norm_counts_rows;
    args.variant = loss.variant(args);
  }
  Tensor as_dtype(const Tensor& t) const {
    return t.scalar_type() == x.scalar_type() ? t : torch::stable::to(t, x.scalar_type());
  }
  void set_state(const Tensor& state) {
    args.state = const_cast<void*>(state.const_data_ptr());
    args.state_width = state.size(-1);
  }
  void set_gradient(const Tensor& dx) {
    args.dx = dx.mutable_data_ptr();
    args.dx_layout = *row_layout(dx);
    const int64_t row_bytes = args.n * dx.element_size();
    args.past_cache = args.dx != args.x && row_bytes >= kRowPastCache && row_bytes * args.rows > kPastCache;
  }
};

// ---- where a kernel runs

inline void run(const TokenLoss& loss, const Call& call) {
  const RowArgs& a = call.args;
  if (a.rows == 0) return;
  if (on_cuda(call.x)) return launch_on_cuda(call.x, loss.cuda_kernel, a);
  const cpu::RowKernels::Kernel kernel = cpu::row_kernels.best().*loss.cpu_kernel;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(a.n, 1));
  in_parallel(a.rows, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// ---- reduction on the CPU: in double, in the order of the rows

inline void check_targets(const RowArgs& a) {
  if (!a.target) return;
  for (int64_t r = 0; r < a.rows; ++r)
    FL_CHECK_INDEX(a.target[r] == a.ignore_index || (a.target[r] >= 0 && a.target[r] < a.n), "Target ",
                   a.target[r], " is out of bounds: expected a class in [0, ", a.n, ") or ignore_index (",
                   a.ignore_index, ")");
}
template <class R>
double norm_of(const RowArgs& a) {
  double sum = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    if (a.target && a.target[r] == a.ignore_index) continue;
    const double w = a.target && a.class_weight && !a.norm_counts_rows
                         ? static_cast<const R*>(a.class_weight)[a.target[r]]
                         : 1;
    sum += w * (a.row_weight ? static_cast<const R*>(a.row_weight)[r] : 1);
  }
  return sum;
}
template <class R>
void reduce(const RowArgs& a, R* out) {
  double sum = 0;
  for (int64_t r = 0; r < a.rows; ++r) sum += static_cast<const R*>(a.loss)[r];
  *out = static_cast<R>(a.norm ? sum / static_cast<double>(*static_cast<const R*>(a.norm)) : sum);
}

// ---- a call of a loss with one result a row

template <class R>
Tensor reduced_as(const TokenLoss& loss, Call& call, Reduction reduction) {
  R norm;
  if (reduction == Reduction::mean) {
    norm = static_cast<R>(norm_of<R>(call.args));
    call.args.norm = &norm;
  }
  Tensor result = empty(call.x, {}, call.accumulation);
  run(loss, call);
  reduce(call.args, static_cast<R*>(result.mutable_data_ptr()));
  return result;
}
// In the type of the logits, or with out_fp32 in the accumulation type: no kernel of its own converts it.
inline Tensor reduced_on_cuda(const TokenLoss& loss, Call& call, Reduction reduction, bool out_fp32) {
  RowArgs& a = call.args;
  a.narrow_result = !out_fp32 && call.x.scalar_type() != call.accumulation;
  const int64_t number = a.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  const int64_t partials = a.rows > kRowsOfBlock ? kRowPartials * sizeof(double) / number : 0;
  // the result, of either type, the norm and partial sums, in memory of the kernels' device
  const int64_t size[] = {2 + partials};
  Tensor totals = empty(call.x, size, call.accumulation);
  char* result = static_cast<char*>(totals.mutable_data_ptr());
  void* norm = result + number;
  if (partials) a.partial = reinterpret_cast<double*>(result + 2 * number);
  Tensor narrow;
  if (a.narrow_result) {
    narrow = empty(call.x, {}, call.x.scalar_type());
    result = static_cast<char*>(narrow.mutable_data_ptr());
  }
  if (reduction == Reduction::mean) a.norm = norm;
  const DeviceScope scope(call.x);
  if (a.norm) scope.launch(FASTLOSS_CUDA_FUNCTION(row_norm), a, norm);
  if (a.rows) scope.launch(loss.cuda_kernel, a);
  scope.launch(FASTLOSS_CUDA_FUNCTION(row_reduce), a, result);
  return a.narrow_result ? narrow : torch::stable::select(totals, 0, 0);
}
// Runs the loss and reduces it over the rows.
inline Tensor reduced(const TokenLoss& loss, Call& call, Reduction reduction, bool out_fp32) {
  if (on_cuda(call.x)) return reduced_on_cuda(loss, call, reduction, out_fp32);
  if (call.args.dtype == DType::f64) return reduced_as<double>(loss, call, reduction);
  return reduced_as<float>(loss, call, reduction);
}

// The results of the forward operators: the loss, the rows' state, and their gradient or an empty tensor.
// Allocates them; `call` has everything else.
inline std::tuple<Tensor, Tensor, Tensor> forward_results(const TokenLoss& kind, Call& call,
                                                          Reduction reduction, bool out_fp32) {
  RowArgs& a = call.args;
  if (!on_cuda(call.x)) check_targets(a);
  const bool with_gradient = a.pass == RowPass::forward_gradient;
  const int64_t state_shape[] = {a.rows, kStateHead + kind.saved}, nothing[] = {0};
  const Tensor state = empty(call.x, state_shape, call.accumulation);
  Tensor loss = empty(call.x, call.row_shape, call.accumulation);
  const Tensor dx = with_gradient ? empty_like_pooled(call.x) : empty(call.x, nothing, call.x.scalar_type());
  call.set_state(state);
  a.loss = loss.mutable_data_ptr();
  if (with_gradient) call.set_gradient(dx);
  if (reduction == Reduction::none) {
    run(kind, call);
  } else {
    loss = reduced(kind, call, reduction, out_fp32);
  }
  if (!out_fp32) loss = call.as_dtype(loss);
  return {loss, state, dx};
}

inline void write_gradient(const TokenLoss& loss, Call& call, const Tensor& upstream, const Tensor& state,
                           const Tensor& dx, bool skip_unit) {
  RowArgs& a = call.args;
  // one number is read as it is on CUDA: no kernel of its own converts it
  a.narrow_upstream = on_cuda(call.x) && upstream.numel() == 1 &&
                      upstream.scalar_type() == call.x.scalar_type() &&
                      call.x.scalar_type() != call.accumulation;
  const Tensor g = a.narrow_upstream ? upstream : contiguous_as(upstream, call.accumulation);
  FL_CHECK(g.numel() == 1 || g.numel() == a.rows, "grad: expected 1 or ", a.rows, " numbers");
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
  run(loss, call);
}

// ---- what there is to run: `<name>_loss`

#define FASTLOSS_DESCRIBE(name, Loss)                                                               \
  inline constexpr TokenLoss name##_loss{&Loss<float, 0>::variant, saved_numbers<Loss>(),           \
                                         Loss<float, 0>::H::count, Loss<float, 0>::kNormCountsRows, \
                                         &cpu::RowKernels::name,   FASTLOSS_CUDA_FUNCTION(name)};
FASTLOSS_ROW_KERNELS(FASTLOSS_DESCRIBE)
#undef FASTLOSS_DESCRIBE

}  // namespace fastloss
