// The operators of the elementwise losses: one way from tensors to ElementArgs for all. A loss adds only its
// line in FASTLOSS_ELEMENT_LOSSES; its schema follows from kInputs and kWrt.
//
// Inputs have one shape; broadcast ones are expanded, and read without a copy. An int64 input holds
// classes [...] and stands for their one-hot encoding [..., C]. A weight of 0 leaves an element out. The
// result is the loss of each element, or their weighted sum: divided by `norm` and, for the mean, by the
// number of elements.
#include <algorithm>
#include <bit>
#include <tuple>
#include <utility>

#include "../cpu/kernels/tables.h"
#include "runtime.h"

namespace fastloss {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kGrain = 32;  // blocks of work for each thread, at least

struct ElementLoss {
  const char* name;
  int inputs;
  unsigned wrt;
  int hparams;
  std::span<const Choice> choices;
  int (*variant)(const double*);
  cpu::ElementKernels::Kernel cpu::ElementKernels::* cpu_kernel;
  void (*cuda_kernel)(const ElementArgs&, void* stream);
};

struct Options {
  Reduction reduction;
  Hparams hparams;
  int64_t ignore_index, background_index;
  bool out_fp32;   // the result of half-precision inputs stays in float32
  int64_t wanted;  // bit mask of the inputs whose gradients are requested
};

// The addresses of a tensor's elements. One that is neither contiguous nor expanded from a contiguous one is
// copied.
ElementInput place(Tensor& t, Source source) {
  ElementInput x{nullptr, source, 1, 1};
  bool outside = false, regular = true;
  const auto sizes = t.sizes(), strides = t.strides();
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (strides[d] != 0) {
      regular = regular && !outside && strides[d] == x.period;
      x.period *= sizes[d];
    } else if (x.period == 1) {
      x.inner *= sizes[d];
    } else {
      outside = true;
    }
  }
  if (!regular) {
    t = torch::stable::contiguous(t);
    x.inner = 1;
    x.period = t.numel();
  }
  x.p = t.const_data_ptr();
  return x;
}
bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// The arguments that forward and backward share; owns the tensors that `args` points into.
struct ElementCall {
  const ElementLoss& loss;
  const Reduction reduction;
  ElementArgs args{};
  Tensors inputs;
  OptionalTensor weight, norm, classes;
  ScalarType type, accumulation;

  ElementCall(const ElementLoss& loss_, Tensors given, const OptionalTensor& weight_,
              const OptionalTensor& norm_, const Options& o)
      : loss(loss_),
        reduction(o.reduction),
        inputs(std::move(given)),
        weight(weight_),
        norm(norm_),
        type(inputs[0].scalar_type()),
        accumulation(accumulation_type(dtype_of(inputs[0], "input"))) {
    const Tensor& first = inputs[0];
    args.dtype = dtype_of(first, "input");
    args.n = first.numel();
    args.ignore_index = o.ignore_index;
    args.background_index = o.background_index;
    for (size_t j = 0; j < inputs.size(); ++j) {
      if (inputs[j].scalar_type() == ScalarType::Long) {
        classes = torch::stable::contiguous(inputs[j]);
        FL_CHECK(first.dim() == classes->dim() + 1,
                 "target: expected classes of the input's shape without "
                 "its last dimension");
        const int64_t columns = first.size(-1);
        FL_CHECK(classes->numel() * columns == args.n, "target: expected ",
                 args.n / std::max<int64_t>(columns, 1), " classes, got ", classes->numel());
        if (o.background_index == INT64_MIN) args.background_index = columns;
        args.inputs[j] = {classes->const_data_ptr(), Source::one_hot, std::max<int64_t>(columns, 1), args.n};
      } else {
        FL_CHECK(same_sizes(inputs[j], first), "inputs: expected tensors of one shape");
        args.inputs[j] = place_number(inputs[j]);
      }
    }
    if (weight) {
      FL_CHECK(same_sizes(*weight, first), "weight: expected a tensor of the input's shape");
      const bool is_acc = weight->scalar_type() == accumulation && accumulation != type;
      args.weight = is_acc ? place(*weight, Source::accumulation) : place_number(*weight);
    } else if (classes) {
      for (const ElementInput& x : args.inputs)
        if (x.source == Source::one_hot) args.weight = x;
      args.weight.source = Source::not_ignored;
    }
    if (norm) {
      FL_CHECK(norm->numel() == 1, "norm: expected one number");
      norm = as_type(*norm, accumulation);
      args.norm = norm->const_data_ptr();
    }
    args.divisor = o.reduction == Reduction::mean ? double(args.n) : 1.0;
    args.scale = 1 / args.divisor;
    args.out_acc = o.out_fp32;
    check_hparams(o.hparams, loss.hparams);
    for (const Choice& c : loss.choices) check_choice(o.hparams[c.hparam], c.names, "hparams");
    std::copy(o.hparams.begin(), o.hparams.end(), args.hparams);
    args.variant = loss.variant(args.hparams);
  }

  ElementInput place_number(Tensor& t) const {
    if (t.scalar_type() == ScalarType::Bool) return place(t, Source::flag);
    t = as_type(t, type);
    return place(t, Source::element);
  }
  ScalarType result_type() const { return args.out_acc ? accumulation : type; }

  void set_gradients(const Tensors& dx) {
    size_t next = 0;
    for (int j = 0; j < loss.inputs; ++j)
      if (loss.wrt >> j & 1) {
        const Tensor& d = dx[next++];
        if (d.numel() == 0) continue;
        FL_CHECK(d.is_contiguous() && d.numel() == args.n && d.scalar_type() == type,
                 "gradient: expected a contiguous tensor like the input");
        args.dx[j] = d.mutable_data_ptr();
      }
  }
  Tensors empty_gradients(int64_t wanted) {
    Tensors dx;
    const int64_t nothing[] = {0};
    for (int j = 0; j < loss.inputs; ++j)
      if (loss.wrt >> j & 1)
        dx.push_back(wanted >> j & 1 ? empty_pooled(inputs[0], inputs[0].sizes(), type)
                                     : empty(inputs[0], nothing, type));
    set_gradients(dx);
    return dx;
  }

  void run() {
    if (on_cuda(inputs[0])) {
      if (args.n || args.partial) launch_on_cuda(inputs[0], loss.cuda_kernel, args);
      return;
    }
    int64_t bytes = args.out ? args.n * inputs[0].element_size() : 0;
    for (void* d : args.dx) bytes += d ? args.n * inputs[0].element_size() : 0;
    args.past_cache = bytes > kPastCache;
    const cpu::ElementKernels::Kernel kernel = cpu::element_kernels.best().*loss.cpu_kernel;
    const int64_t blocks = element_blocks(args.n);
    in_parallel(blocks, kGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  void check_classes() const {
    if (!classes || on_cuda(inputs[0])) return;
    const int64_t* c = static_cast<const int64_t*>(classes->const_data_ptr());
    const int64_t columns = inputs[0].size(-1);
    for (int64_t i = 0; i < classes->numel(); ++i)
      FL_CHECK_INDEX(
          (c[i] >= 0 && c[i] < columns) || c[i] == args.ignore_index || c[i] == args.background_index,
          "target ", c[i], " is out of bounds: expected a class in [0, ", columns,
          "), the background or ignore_index");
  }

  // A number: the sum of all losses, divided.
  Tensor reduced() {
    const Tensor result = empty(inputs[0], {}, result_type());
    if (on_cuda(inputs[0])) {
      const int64_t partials = call_cuda(FASTLOSS_CUDA_FUNCTION(element_partials), args.dtype, args.n);
      const int64_t count[] = {std::max<int64_t>(1, partials)};
      const Tensor partial = empty(inputs[0], count, ScalarType::Double);
      args.partial = static_cast<double*>(partial.mutable_data_ptr());
      args.result = result.mutable_data_ptr();
      run();
      return result;
    }
    std::vector<double> partial(std::max<int64_t>(1, element_blocks(args.n)));
    args.partial = partial.data();
    run();
    double sum = 0;
    for (double p : partial) sum += p;
    sum /= args.divisor * norm_value();
    if (result_type() == ScalarType::Float) {
      *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(sum);
      return result;
    }
    const Tensor exact = empty(inputs[0], {}, ScalarType::Double);
    *static_cast<double*>(exact.mutable_data_ptr()) = sum;
    return torch::stable::to(exact, result_type());
  }
  double norm_value() const {
    if (!args.norm) return 1;
    return args.dtype == DType::f64 ? *static_cast<const double*>(args.norm)
                                    : *static_cast<const float*>(args.norm);
  }

  bool is_one(const Tensor& g) const {
    if (g.scalar_type() == ScalarType::Float) return *static_cast<const float*>(g.const_data_ptr()) == 1;
    const Tensor value = as_type(g, ScalarType::Double);
    return *static_cast<const double*>(value.const_data_ptr()) == 1;
  }
  void backward(const Tensor& grad, bool skip_unit) {
    Tensor g = as_type(grad, result_type());
    args.upstream = place(g, result_type() == type ? Source::element : Source::accumulation);
    FL_CHECK(g.numel() == 1 || g.numel() == args.n, "grad: expected 1 or ", args.n, " numbers");
    if (skip_unit && !on_cuda(inputs[0]) && g.numel() == 1 && is_one(g)) return;
    args.skip_unit_upstream = skip_unit;
    run();
  }
};

template <const ElementLoss& kLoss, class Inputs, class Gradients>
struct ElementOps;
template <const ElementLoss& kLoss, size_t... I, size_t... G>
struct ElementOps<kLoss, std::index_sequence<I...>, std::index_sequence<G...>> {
  template <size_t>
  using Each = Tensor;

  static std::tuple<Tensor, Each<G>...> forward(Each<I>... inputs, OptionalTensor weight, OptionalTensor norm,
                                                int64_t reduction, Hparams hparams, int64_t ignore_index,
                                                int64_t background_index, bool out_fp32, int64_t wanted,
                                                bool with_gradient) {
    ElementCall call(kLoss, {inputs...}, weight, norm,
                     {enum_of<Reduction>(reduction, "reduction"), hparams, ignore_index, background_index,
                      out_fp32, wanted});
    call.check_classes();
    const Tensors dx = call.empty_gradients(with_gradient ? wanted : 0);
    if (call.reduction != Reduction::none) {
      const Tensor loss = call.reduced();
      return {loss, dx[G]...};
    }
    const Tensor loss = empty_pooled(call.inputs[0], call.inputs[0].sizes(), call.result_type());
    call.args.out = loss.mutable_data_ptr();
    call.run();
    return {loss, dx[G]...};
  }

  static std::tuple<Each<G>...> backward(Tensor grad, Each<I>... inputs, OptionalTensor weight,
                                         OptionalTensor norm, int64_t reduction, Hparams hparams,
                                         int64_t ignore_index, int64_t background_index, bool out_fp32,
                                         int64_t wanted) {
    ElementCall call(kLoss, {inputs...}, weight, norm,
                     {enum_of<Reduction>(reduction, "reduction"), hparams, ignore_index, background_index,
                      out_fp32, wanted});
    const Tensors dx = call.empty_gradients(wanted);
    call.backward(grad, false);
    return {dx[G]...};
  }

  // Into the buffers that the forward pass filled for an upstream gradient of 1.
  static void backward_into(Tensor grad, Each<G>... dx, Each<I>... inputs, OptionalTensor weight,
                            OptionalTensor norm, int64_t reduction, Hparams hparams, int64_t ignore_index,
                            int64_t background_index, bool out_fp32, int64_t wanted, bool skip_unit) {
    ElementCall call(kLoss, {inputs...}, weight, norm,
                     {enum_of<Reduction>(reduction, "reduction"), hparams, ignore_index, background_index,
                      out_fp32, wanted});
    call.set_gradients({dx...});
    call.backward(grad, skip_unit);
  }
};
template <const ElementLoss& kLoss>
using OpsOf = ElementOps<kLoss, std::make_index_sequence<kLoss.inputs>,
                         std::make_index_sequence<std::popcount(kLoss.wrt)>>;

std::string repeated(const char* before, int count, const char* after) {
  std::string s;
  for (int i = 0; i < count; ++i) s += before + std::to_string(i) + after;
  return s;
}
void define(StableLibrary& m, const ElementLoss& loss) {
  const int gradients = std::popcount(loss.wrt);
  const std::string name = loss.name, inputs = repeated("Tensor input", loss.inputs, ", ");
  const std::string options =
      "Tensor? weight, Tensor? norm, int reduction, float[] hparams, int ignore_index, int background_index, "
      "bool wide, int wanted";
  std::string results = repeated("Tensor d", gradients, ", ");
  results.resize(results.size() - 2);
  std::string buffers;
  for (int i = 0; i < gradients; ++i)
    buffers += std::string("Tensor(") + char('a' + i) + "!) d" + std::to_string(i) + ", ";
  m.def((name + "_fwd(" + inputs + options + ", bool with_gradient) -> (Tensor loss, " + results + ")")
            .c_str());
  m.def((name + "_bwd(Tensor grad, " + inputs + options + ") -> (" + results + ")").c_str());
  m.def((name + "_bwd_into(Tensor grad, " + buffers + inputs + options + ", bool skip_unit) -> ()").c_str());
}

#define FASTLOSS_DESCRIBE(name, Loss)                             \
  constexpr ElementLoss name##_loss{#name,                        \
                                    Loss<float, 0>::kInputs,      \
                                    Loss<float, 0>::kWrt,         \
                                    Loss<float, 0>::H::count,     \
                                    choices_of<Loss<float, 0>>(), \
                                    &Loss<float, 0>::variant,     \
                                    &cpu::ElementKernels::name,   \
                                    FASTLOSS_CUDA_FUNCTION(name)};
FASTLOSS_ELEMENT_LOSSES(FASTLOSS_DESCRIBE)

#define FASTLOSS_DEFINE(name, Loss) define(m, name##_loss);
#define FASTLOSS_IMPLEMENT(name, Loss)                            \
  m.impl(#name "_fwd", TORCH_BOX(&OpsOf<name##_loss>::forward));  \
  m.impl(#name "_bwd", TORCH_BOX(&OpsOf<name##_loss>::backward)); \
  m.impl(#name "_bwd_into", TORCH_BOX(&OpsOf<name##_loss>::backward_into));

void define_all(StableLibrary& m) { FASTLOSS_ELEMENT_LOSSES(FASTLOSS_DEFINE) }
void implement(StableLibrary& m) { FASTLOSS_ELEMENT_LOSSES(FASTLOSS_IMPLEMENT) }

}  // namespace

FASTLOSS_OPERATORS(define_all, implement)

}  // namespace fastloss
