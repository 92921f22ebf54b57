// The operators of the recursions in time. All share one schema: a new one is a line in FASTLOSS_SCANS.
#include <algorithm>
#include <tuple>

#include "../cpu/kernels/tables.h"
#include "runtime.h"

namespace fastloss {
namespace {

struct Scan {
  int hparams;
  cpu::ScanKernels::Kernel cpu::ScanKernels::* cpu_kernel;
  void (*cuda_kernel)(const ScanArgs&, void* stream);
};

// Holds the tensors that `args` points into.
struct ScanCall {
  ScanArgs args{};
  Tensor x;
  ScalarType type;
  std::vector<Tensor> held;

  ScanCall(const Scan& scan, const Tensor& rewards, const OptionalTensor& values,
           const OptionalTensor& next_values, const OptionalTensor& bootstrap_value,
           const OptionalTensor& log_rhos, const OptionalTensor& terminated, const OptionalTensor& truncated,
           const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const Hparams& hparams)
      : x(rewards.is_contiguous() ? rewards : torch::stable::contiguous(rewards)), type(x.scalar_type()) {
    FL_CHECK(x.dim() >= 1, "rewards: expected at least one dimension");
    held.reserve(10);
    args.dtype = dtype_of(x, "rewards");
    args.n = x.size(-1);
    args.rows = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) args.rows *= x.size(d);
    if (cu_seqlens) {
      FL_CHECK(x.dim() == 1, "rewards: expected one dimension with cu_seqlens");
      args.rows = cu_seqlens->numel() - 1;
      args.offsets = static_cast<const int64_t*>(hold(*cu_seqlens, ScalarType::Long));
      if (!on_cuda(x)) check_offsets();
    }
    args.in[0] = x.const_data_ptr();
    args.in[1] = step_input(values, "values", type);
    args.in[2] = step_input(next_values, "next_values", type);
    args.in[3] = step_input(log_rhos, "log_rhos", type);
    args.terminated = flags(terminated, "terminated");
    args.truncated = flags(truncated, "truncated");
    args.mask = flags(mask, "mask");
    if (bootstrap_value) {
      FL_CHECK(bootstrap_value->numel() == args.rows, "bootstrap_value: expected ", args.rows,
               " numbers, got ", bootstrap_value->numel());
      args.initial = hold(*bootstrap_value, type);
    }
    check_hparams(hparams, scan.hparams);
    std::copy(hparams.begin(), hparams.end(), args.hparams);
  }

  const void* hold(const Tensor& t, ScalarType as) {
    held.push_back(contiguous_as(t, as));
    return held.back().const_data_ptr();
  }
  const void* step_input(const OptionalTensor& t, const char* name, ScalarType as) {
    if (!t) return nullptr;
    FL_CHECK(t->numel() == x.numel(), name, ": expected ", x.numel(), " numbers, got ", t->numel());
    return hold(*t, as);
  }
  const uint8_t* flags(const OptionalTensor& t, const char* name) {
    return static_cast<const uint8_t*>(step_input(t, name, ScalarType::Bool));
  }
  void check_offsets() const {
    const int64_t* o = args.offsets;
    FL_CHECK(args.rows >= 0 && o[0] == 0 && o[args.rows] == args.n, "cu_seqlens: expected to begin with 0 ",
             "and to end with the number of steps, ", args.n);
    for (int64_t r = 0; r < args.rows; ++r)
      FL_CHECK(o[r] <= o[r + 1], "cu_seqlens: expected numbers that never decrease");
  }
  void run(const Scan& scan) const {
    if (args.rows <= 0) return;
    if (on_cuda(x)) return launch_on_cuda(x, scan.cuda_kernel, args);
    const cpu::ScanKernels::Kernel kernel = cpu::scan_kernels.best().*scan.cpu_kernel;
    const int64_t mean = std::max<int64_t>(args.offsets ? args.n / args.rows : args.n, 1);
    const int64_t grain = std::max<int64_t>(16, 32768 / mean / 16 * 16);
    in_parallel(args.rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
};

template <const Scan& kScan>
struct ScanOps {
  static std::tuple<Tensor, Tensor> forward(Tensor rewards, OptionalTensor values, OptionalTensor next_values,
                                            OptionalTensor bootstrap_value, OptionalTensor log_rhos,
                                            OptionalTensor terminated, OptionalTensor truncated,
                                            OptionalTensor mask, OptionalTensor cu_seqlens, Hparams hparams) {
    ScanCall call(kScan, rewards, values, next_values, bootstrap_value, log_rhos, terminated, truncated, mask,
                  cu_seqlens, hparams);
    const Tensor first = empty_pooled(call.x, call.x.sizes(), call.type);
    const Tensor second = empty_pooled(call.x, call.x.sizes(), call.type);
    call.args.out[0] = first.mutable_data_ptr();
    call.args.out[1] = second.mutable_data_ptr();
    call.run(kScan);
    return {first, second};
  }

  // Of rewards, values, next_values and bootstrap_value; empty where there is no such input.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      OptionalTensor grad_first, OptionalTensor grad_second, Tensor rewards, OptionalTensor values,
      OptionalTensor next_values, OptionalTensor bootstrap_value, OptionalTensor log_rhos,
      OptionalTensor terminated, OptionalTensor truncated, OptionalTensor mask, OptionalTensor cu_seqlens,
      Hparams hparams) {
    ScanCall call(kScan, rewards, values, next_values, bootstrap_value, log_rhos, terminated, truncated, mask,
                  cu_seqlens, hparams);
    ScanArgs& a = call.args;
    a.backward = true;
    a.grad[0] = call.step_input(grad_first, "gradient", call.type);
    a.grad[1] = call.step_input(grad_second, "gradient", call.type);
    auto like = [&](const OptionalTensor& t, void*& out) {
      const int64_t nothing[] = {0};
      if (!t) return empty(call.x, nothing, call.type);
      const Tensor g = empty_pooled(call.x, t->sizes(), call.type);
      out = g.mutable_data_ptr();
      return g;
    };
    const Tensor d_rewards = like(rewards, a.out[0]), d_values = like(values, a.out[1]);
    const Tensor d_next = like(next_values, a.out[2]), d_bootstrap = like(bootstrap_value, a.initial_grad);
    call.run(kScan);
    return {d_rewards, d_values, d_next, d_bootstrap};
  }
};

#define FASTLOSS_DESCRIBE(name, Loss) \
  constexpr Scan name##_scan{Loss<float>::H::count, &cpu::ScanKernels::name, FASTLOSS_CUDA_FUNCTION(name)};
FASTLOSS_SCANS(FASTLOSS_DESCRIBE)

template <template <class> class Loss>
inline constexpr bool differentiates = Loss<float>::kBackward;

#define FASTLOSS_SCAN_TENSORS                                                                        \
  "Tensor rewards, Tensor? values, Tensor? next_values, Tensor? bootstrap_value, Tensor? log_rhos, " \
  "Tensor? terminated, Tensor? truncated, Tensor? mask, Tensor? cu_seqlens, float[] hparams"
#define FASTLOSS_DEFINE(name, Loss)                                                    \
  m.def(#name "_fwd(" FASTLOSS_SCAN_TENSORS ") -> (Tensor, Tensor)");                  \
  if (differentiates<Loss>)                                                            \
    m.def(#name "_bwd(Tensor? grad_first, Tensor? grad_second, " FASTLOSS_SCAN_TENSORS \
                ") -> (Tensor rewards, Tensor values, Tensor next_values, Tensor bootstrap_value)");
#define FASTLOSS_IMPLEMENT(name, Loss)                             \
  m.impl(#name "_fwd", TORCH_BOX(&ScanOps<name##_scan>::forward)); \
  if (differentiates<Loss>) m.impl(#name "_bwd", TORCH_BOX(&ScanOps<name##_scan>::backward));

void define(StableLibrary& m) { FASTLOSS_SCANS(FASTLOSS_DEFINE) }
void implement(StableLibrary& m) { FASTLOSS_SCANS(FASTLOSS_IMPLEMENT) }

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
