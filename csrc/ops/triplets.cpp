// triplets: for each row of x [m, d] as an anchor the sum over its triplets, and how many are greater than
// 0: [2, m].
#include <algorithm>

#include "../cpu/kernels/triplets.h"
#include "runtime.h"

namespace fastloss {
namespace {

constexpr int64_t kBudget = 4 << 20, kCudaBudget = 64 << 20;  // bytes of distances

struct TripletCall {
  TripletArgs args{};
  Tensor x, ids;

  TripletCall(const Tensor& x_, const Tensor& ids_, double margin, bool root)
      : x(contiguous_as(x_, x_.scalar_type())), ids(contiguous_as(ids_, ScalarType::Long)) {
    const ScalarType type = x.scalar_type();
    FL_CHECK(x.dim() == 2 && (type == ScalarType::Float || type == ScalarType::Double),
             "x: expected rows of the accumulation type");
    FL_CHECK(ids.dim() == 1 && ids.size(0) == x.size(0), "ids: expected one for each row");
    args.is_double = type == ScalarType::Double;
    args.root = root;
    args.m = x.size(0);
    args.d = x.size(1);
    args.margin = margin;
    args.x = x.const_data_ptr();
    args.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  }
  // Runs the chunks of anchors one after another; their size depends on the shape alone.
  template <class Run>
  void chunks(int64_t budget, int64_t row_bytes, Run run) {
    const int64_t max_rows = std::clamp<int64_t>(budget / row_bytes, 1, args.m);
    const int64_t size[] = {max_rows * args.ld};
    const Tensor distance = empty_pooled(x, size, x.scalar_type());
    args.distance = distance.mutable_data_ptr();
    for (args.row = 0; args.row < args.m; args.row += max_rows) {
      args.rows = std::min(max_rows, args.m - args.row);
      run();
    }
  }
  void run() {
    if (args.m == 0) return;
    const int64_t bytes = args.is_double ? 8 : 4;
    if (on_cuda(x)) {
      args.ld = args.m;
      args.capacity = 1;
      while (args.capacity < args.m / 2) args.capacity *= 2;
      const int64_t row_bytes = (args.m + args.capacity) * bytes + (2 * args.capacity + 1) * 4;
      const int64_t max_rows = std::clamp<int64_t>(kCudaBudget / row_bytes, 1, args.m);
      const int64_t dist_size[] = {max_rows * args.capacity},
                    perm_size[] = {max_rows * (2 * args.capacity + 1)};
      const Tensor sorted_dist = empty(x, dist_size, x.scalar_type()),
                   perm = empty(x, perm_size, ScalarType::Int);
      args.sorted_dist = sorted_dist.mutable_data_ptr();
      args.perm = static_cast<int32_t*>(perm.mutable_data_ptr());
      return chunks(kCudaBudget, row_bytes,
                    [&] { launch_on_cuda(x, FASTLOSS_CUDA_FUNCTION(triplets), args); });
    }
    const cpu::TripletKernels& kernels = cpu::triplet_kernels.best();
    const int64_t groups = (args.m + cpu::kTripletRows - 1) / cpu::kTripletRows;
    args.ld = groups * cpu::kTripletRows;
    const int64_t size[] = {args.ld * std::max<int64_t>(args.d, 1)};
    const Tensor panels = empty_pooled(x, size, x.scalar_type());
    args.panels = panels.mutable_data_ptr();
    const auto parallel = [&](int64_t n, int64_t work, void (*kernel)(const TripletArgs&, int64_t, int64_t)) {
      const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(work, 1));
      in_parallel(n, grain, [&](int64_t b, int64_t e) { kernel(args, b, e); });
    };
    parallel(groups, cpu::kTripletRows * args.d, kernels.pack);
    chunks(kBudget, args.ld * bytes, [&] {
      parallel(args.rows, args.m * (args.d + 8), kernels.anchors);
      if (args.sums) return;
      parallel(args.rows, args.m * args.d, kernels.draw_anchors);
      parallel(args.m, args.rows * args.d, kernels.draw_others);
    });
  }
};

Tensor forward(Tensor x, Tensor ids, double margin, bool root) {
  TripletCall call(x, ids, margin, root);
  const int64_t shape[] = {2, call.args.m};
  const Tensor sums = empty(call.x, shape, call.x.scalar_type());
  call.args.sums = sums.mutable_data_ptr();
  call.run();
  return sums;
}
Tensor backward(Tensor grad, Tensor x, Tensor ids, double margin, bool root) {
  TripletCall call(x, ids, margin, root);
  const Tensor g = contiguous_as(grad, call.x.scalar_type());
  FL_CHECK(g.numel() == 2 * call.args.m, "grad: expected the shape of the sums");
  Tensor dx = empty_like_pooled(call.x);
  torch::stable::zero_(dx);
  call.args.grad = g.const_data_ptr();
  call.args.dx = dx.mutable_data_ptr();
  call.run();
  return dx;
}

void define(StableLibrary& m) {
  m.def("triplets_fwd(Tensor x, Tensor ids, float margin, bool root) -> Tensor");
  m.def("triplets_bwd(Tensor grad, Tensor x, Tensor ids, float margin, bool root) -> Tensor");
}
void implement(StableLibrary& m) {
  m.impl("triplets_fwd", TORCH_BOX(&forward));
  m.impl("triplets_bwd", TORCH_BOX(&backward));
}

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
