// The operators of the token losses. All share one schema, one set of checks and one way from tensors to
// RowArgs; a loss adds only its line in FASTLOSS_TOKEN_LOSSES.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../cpu/dispatch.h"
#include "library.h"
#if defined(FASTLOSS_CUDA) || defined(FL_SIMT)
#define FASTLOSS_HAS_CUDA 1
#include "../cuda/launchers.h"
#endif

namespace fastloss {
namespace {

enum Reduction : int64_t { kNone, kMean, kSum };
using OptionalTensor = std::optional<Tensor>;
using Options = std::vector<double>;

// Outputs from here on are written past the caches: about the last level that one socket shares among its
// cores.
constexpr int64_t kPastCache = 24 << 20, kRowPastCache = 2048;
constexpr int kStateHead = 3;  // m, log_sum, k; then what the loss saves

struct TokenLoss {
  int (*variant)(const RowArgs&);
  int saved;
  cpu::RowKernel cpu::Kernels::* cpu_kernel;
#if defined(FASTLOSS_HAS_CUDA)
  void (*cuda_kernel)(const RowArgs&, void* stream);
#endif
};

// The same for all variants of a loss, so that the state's shape depends on nothing but the loss.
template <template <class, int> class Loss, int kVariant = 0>
constexpr int saved() {
  if constexpr (kVariant + 1 < Loss<float, 0>::kVariants)
    return std::max(Loss<float, kVariant>::kSaved, saved<Loss, kVariant + 1>());
  return Loss<float, kVariant>::kSaved;
}

// ---- tensors as rows

// [N, C, d1, ...] or [C]; nullopt where the trailing dimensions have no common stride.
std::optional<RowLayout> row_layout(const Tensor& t) {
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
Tensor as_rows(const Tensor& t) { return row_layout(t) ? t : torch::stable::contiguous(t); }
Tensor as_type(const Tensor& t, ScalarType type) {
  const Tensor typed = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

// What forward and backward tell the kernels alike; holds the tensors that `args` points into.
struct Call {
  RowArgs args{};
  Tensor x, target;
  OptionalTensor weight;
  ScalarType accumulation;
  std::vector<int64_t> row_shape;

  Call(const TokenLoss& loss, RowPass pass, const Tensor& input, const Tensor& target_,
       const OptionalTensor& weight_, double logit_scale, double softcap, const Options& options)
      : x(as_rows(input)), target(target_), accumulation(accumulation_type(dtype_of(input, "input"))) {
    STD_TORCH_CHECK(input.dim() >= 1, "input: expected at least one dimension");
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
      STD_TORCH_CHECK(target.numel() == args.rows, "target: expected ", args.rows, " class indices, got ",
                      target.numel());
      target = as_type(target, ScalarType::Long);
      args.target = static_cast<const int64_t*>(target.const_data_ptr());
    } else {
      STD_TORCH_CHECK(target.numel() == x.numel(), "target: expected a probability for each class");
      target = as_rows(as_dtype(target));
      args.q = target.const_data_ptr();
      args.q_layout = *row_layout(target);
    }
    if (weight_) {
      STD_TORCH_CHECK(weight_->numel() == args.n, "weight: expected ", args.n, " numbers, got ",
                      weight_->numel());
      weight = as_type(*weight_, accumulation);
      args.class_weight = weight->const_data_ptr();
    }
    args.logit_scale = logit_scale;
    args.softcap = softcap;
    STD_TORCH_CHECK(options.size() <= kMaxOptions, "options: too many");
    std::copy(options.begin(), options.end(), args.options);
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

#if defined(FL_SIMT)
bool on_cuda(const Tensor&) { return true; }  // the CUDA kernels, executed on the CPU
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
};
#else
bool on_cuda(const Tensor& t) { return !t.is_cpu(); }
struct DeviceScope {
  torch::stable::accelerator::DeviceGuard guard;
  explicit DeviceScope(const Tensor& t) : guard(t.get_device_index()) {}
};
#endif

#if defined(FASTLOSS_HAS_CUDA)
void run_cuda(const TokenLoss& loss, const Call& call) {
  const DeviceScope scope(call.x);
  loss.cuda_kernel(call.args, current_stream(call.x));
}
#else
[[noreturn]] void run_cuda(const TokenLoss&, const Call&) {
  throw std::runtime_error(
      "fastloss was built without CUDA kernels: install nvcc and rebuild with FASTLOSS_CUDA=1 pip install "
      "--no-build-isolation --force-reinstall --no-deps .");
}
#endif

void run(const TokenLoss& loss, const Call& call) {
  const RowArgs& a = call.args;
  if (a.rows == 0) return;
  if (on_cuda(call.x)) return run_cuda(loss, call);
  const cpu::RowKernel kernel = cpu::kernels().*loss.cpu_kernel;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(a.n, 1));
  if (a.rows <= grain) return kernel(a, 0, a.rows);
  torch::stable::parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// ---- reduction on the CPU: in double, in the order of the rows

void check_targets(const RowArgs& a) {
  if (!a.target) return;
  for (int64_t r = 0; r < a.rows; ++r)
    STD_TORCH_CHECK(a.target[r] == a.ignore_index || (a.target[r] >= 0 && a.target[r] < a.n), "Target ",
                    a.target[r], " is out of bounds: expected a class in [0, ", a.n, ") or ignore_index (",
                    a.ignore_index, ")");
}
template <class R>
double norm_of(const RowArgs& a) {
  double sum = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    if (a.target && a.target[r] == a.ignore_index) continue;
    const double w = a.target && a.class_weight ? static_cast<const R*>(a.class_weight)[a.target[r]] : 1;
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
    const bool cuda = on_cuda(call.x), f64 = a.dtype == DType::f64;
    if (!cuda) check_targets(a);
    const int64_t width = kStateHead + kLoss.saved;
    const int64_t state_shape[] = {a.rows, width};
    const Tensor state = torch::stable::new_empty(call.x, state_shape, call.accumulation);
    Tensor loss = torch::stable::new_empty(call.x, call.row_shape, call.accumulation);
    const int64_t nothing[] = {0};
    const Tensor dx = with_gradient ? empty_like_pooled(call.x) : torch::stable::new_empty(call.x, nothing);
    call.set_state(state);
    a.loss = loss.mutable_data_ptr();
    if (with_gradient) call.set_gradient(dx);

    // [0] the result, [1] the norm: numbers that stay where the kernels can read them
    const int64_t two[] = {2};
    Tensor numbers = reduction == kNone ? loss : torch::stable::new_empty(call.x, two, call.accumulation);
    if (reduction != kNone) {
      void* result = numbers.mutable_data_ptr();
      void* norm = static_cast<char*>(result) + (f64 ? sizeof(double) : sizeof(float));
      if (reduction == kMean) a.norm = norm;
      if (cuda) {
#if defined(FASTLOSS_HAS_CUDA)
        const DeviceScope scope(call.x);
        void* stream = current_stream(call.x);
        if (a.norm) cuda::row_norm(a, norm, stream);
        if (a.rows) kLoss.cuda_kernel(a, stream);
        cuda::row_reduce(a, result, stream);
#else
        run_cuda(kLoss, call);
#endif
      } else if (f64) {
        if (a.norm) *static_cast<double*>(norm) = norm_of<double>(a);
        run(kLoss, call);
        reduce(a, static_cast<double*>(result));
      } else {
        if (a.norm) *static_cast<float*>(norm) = static_cast<float>(norm_of<float>(a));
        run(kLoss, call);
        reduce(a, static_cast<float*>(result));
      }
      loss = torch::stable::select(numbers, 0, 0);
    } else {
      run(kLoss, call);
    }
    if (!wide) loss = call.as_dtype(loss);
    return {loss, state, dx};
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

#if defined(FASTLOSS_HAS_CUDA)
#define FASTLOSS_CUDA_FIELD(name) &cuda::name
#else
#define FASTLOSS_CUDA_FIELD(name)
#endif
#define FASTLOSS_DESCRIBE(name, Loss)                                                           \
  constexpr TokenLoss name##_loss{&Loss<float, 0>::variant, saved<Loss>(), &cpu::Kernels::name, \
                                  FASTLOSS_CUDA_FIELD(name)};
FASTLOSS_TOKEN_LOSSES(FASTLOSS_DESCRIBE)

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
