// feature_pairs: of rows a and b [N, D] the sums <a, b>, <a, a>, <b, b>, |a - b + eps|^2, [4, N].
#include <algorithm>
#include <tuple>

#include "../core/feature_pairs.h"
#include "device.h"
#if !defined(FL_SIMT)
#include "../cpu/feature_pairs.h"
#endif

namespace fastloss {
namespace {

struct Pairs {
  FeatureArgs args{};
  Tensor a, b;

  Pairs(const Tensor& a_, const Tensor& b_, double eps)
      : a(contiguous_as(a_, a_.scalar_type())), b(contiguous_as(b_, b_.scalar_type())) {
    STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) && a.size(1) == b.size(1) &&
                        a.scalar_type() == b.scalar_type(),
                    "b: expected the shape and type of a, two dimensions");
    args.dtype = dtype_of(a, "a");
    args.rows = a.size(0);
    args.n = a.size(1);
    args.a = a.const_data_ptr();
    args.b = b.const_data_ptr();
    args.eps = eps;
  }
  void run() const {
    if (args.rows == 0) return;
#if defined(FASTLOSS_HAS_CUDA)
    if (runs_on_cuda(a)) return launch_on(a, &cuda::feature_pairs, args);
#endif
#if !defined(FL_SIMT)
    const cpu::FeatureKernel kernel = cpu::feature_kernel();
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(args.n, 1));
    torch::stable::parallel_for(0, args.rows, grain, [&](int64_t i, int64_t e) { kernel(args, i, e); });
#endif
  }
};

Tensor forward(Tensor a, Tensor b, double eps) {
  Pairs pairs(a, b, eps);
  const int64_t shape[] = {kFeatureSums, pairs.args.rows};
  const Tensor sums = empty(pairs.a, shape, accumulation_type(pairs.args.dtype));
  pairs.args.sums = sums.mutable_data_ptr();
  pairs.run();
  return sums;
}
std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor a, Tensor b, double eps) {
  Pairs pairs(a, b, eps);
  const Tensor g = contiguous_as(grad, accumulation_type(pairs.args.dtype));
  STD_TORCH_CHECK(g.numel() == kFeatureSums * pairs.args.rows, "grad: expected the shape of the sums");
  const Tensor da = empty_like_pooled(pairs.a), db = empty_like_pooled(pairs.b);
  pairs.args.grad = g.const_data_ptr();
  pairs.args.da = da.mutable_data_ptr();
  pairs.args.db = db.mutable_data_ptr();
  pairs.run();
  return {da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLOSS_NAMESPACE, m) {
  m.def("feature_pairs_fwd(Tensor a, Tensor b, float eps) -> Tensor");
  m.def("feature_pairs_bwd(Tensor grad, Tensor a, Tensor b, float eps) -> (Tensor da, Tensor db)");
}
STABLE_TORCH_LIBRARY_IMPL(FASTLOSS_NAMESPACE, CPU, m) {
  m.impl("feature_pairs_fwd", TORCH_BOX(&forward));
  m.impl("feature_pairs_bwd", TORCH_BOX(&backward));
}
#if !defined(FL_SIMT) && defined(FASTLOSS_HAS_CUDA)
STABLE_TORCH_LIBRARY_IMPL(FASTLOSS_NAMESPACE, CUDA, m) {
  m.impl("feature_pairs_fwd", TORCH_BOX(&forward));
  m.impl("feature_pairs_bwd", TORCH_BOX(&backward));
}
#endif

}  // namespace fastloss
