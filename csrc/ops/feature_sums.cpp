// feature_pairs: of rows a and b [N, D] the sums <a, b>, <a, a>, <b, b>, |a - b + eps|^2, [4, N]; with c
// those of a and c after them.
#include <algorithm>
#include <tuple>

#include "../cpu/kernels/feature_sums.h"
#include "runtime.h"

namespace fastloss {
namespace {

struct Pairs {
  FeatureArgs args{};
  Tensor a;
  std::vector<Tensor> others;

  Pairs(const Tensor& a_, const Tensor& b, const OptionalTensor& c, double eps)
      : a(contiguous_as(a_, a_.scalar_type())) {
    FL_CHECK(a.dim() == 2, "a: expected two dimensions");
    args.dtype = dtype_of(a, "a");
    args.rows = a.size(0);
    args.n = a.size(1);
    args.a = a.const_data_ptr();
    args.eps = eps;
    add(b, "b");
    if (c) add(*c, "c");
  }
  void add(const Tensor& x, const char* name) {
    FL_CHECK(
        x.dim() == 2 && x.size(0) == args.rows && x.size(1) == args.n && x.scalar_type() == a.scalar_type(),
        name, ": expected the shape and type of a");
    others.push_back(contiguous_as(x, x.scalar_type()));
    args.other[args.others++] = others.back().const_data_ptr();
  }
  void run() const {
    if (args.rows == 0) return;
    if (on_cuda(a)) return launch_on_cuda(a, FASTLOSS_CUDA_FUNCTION(feature_pairs), args);
    const cpu::FeatureKernel kernel = cpu::feature_kernel.best();
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(args.n, 1));
    in_parallel(args.rows, grain, [&](int64_t i, int64_t e) { kernel(args, i, e); });
  }
};

Tensor forward(Tensor a, Tensor b, OptionalTensor c, double eps) {
  Pairs pairs(a, b, c, eps);
  const int64_t shape[] = {pairs.args.others * kFeatureSums, pairs.args.rows};
  const Tensor sums = empty(pairs.a, shape, accumulation_type(pairs.args.dtype));
  pairs.args.sums = sums.mutable_data_ptr();
  pairs.run();
  return sums;
}
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor a, Tensor b, OptionalTensor c, double eps) {
  Pairs pairs(a, b, c, eps);
  FeatureArgs& args = pairs.args;
  const Tensor g = contiguous_as(grad, accumulation_type(args.dtype));
  FL_CHECK(g.numel() == args.others * kFeatureSums * args.rows, "grad: expected the shape of the sums");
  const int64_t none[] = {0};
  const Tensor da = empty_like_pooled(pairs.a), db = empty_like_pooled(pairs.a),
               dc = c ? empty_like_pooled(pairs.a) : empty(pairs.a, none, pairs.a.scalar_type());
  args.grad = g.const_data_ptr();
  args.da = da.mutable_data_ptr();
  args.d_other[0] = db.mutable_data_ptr();
  if (c) args.d_other[1] = dc.mutable_data_ptr();
  args.past_cache =
      (1 + args.others) * args.rows * args.n * static_cast<int64_t>(a.element_size()) > kPastCache;
  pairs.run();
  return {da, db, dc};
}

void define(StableLibrary& m) {
  m.def("feature_pairs_fwd(Tensor a, Tensor b, Tensor? c, float eps) -> Tensor");
  m.def(
      "feature_pairs_bwd(Tensor grad, Tensor a, Tensor b, Tensor? c, float eps) -> (Tensor da, Tensor db, "
      "Tensor dc)");
}
void implement(StableLibrary& m) {
  m.impl("feature_pairs_fwd", TORCH_BOX(&forward));
  m.impl("feature_pairs_bwd", TORCH_BOX(&backward));
}

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
