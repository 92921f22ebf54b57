// ranking: the loss of each row of rewards [rows, n] with ranks [rows, n], see losses/reward_model.h. `state`
// is what backward needs of each row.
#include <algorithm>
#include <tuple>

#include "../cpu/kernels/reward_model.h"
#include "runtime.h"

namespace fastloss {
namespace {

struct RankingCall {
  RankingArgs args{};
  Tensor rewards, ranks;
  ScalarType accumulation;

  RankingCall(const Tensor& rewards_, const Tensor& ranks_, int64_t kind)
      : rewards(contiguous_as(rewards_, rewards_.scalar_type())),
        ranks(rewards),
        accumulation(accumulation_type(dtype_of(rewards_, "rewards"))) {
    FL_CHECK(rewards.dim() == 2 && ranks_.dim() == 2 && ranks_.size(0) == rewards.size(0) &&
                 ranks_.size(1) == rewards.size(1),
             "ranks: expected the shape of rewards, two dimensions");
    ranks = contiguous_as(ranks_, accumulation);
    args.kind = enum_of<Ranking>(kind, "kind");
    args.dtype = dtype_of(rewards, "rewards");
    args.rows = rewards.size(0);
    args.n = rewards.size(1);
    args.rewards = rewards.const_data_ptr();
    args.ranks = ranks.const_data_ptr();
  }
  void run() const {
    if (args.rows == 0) return;
    if (on_cuda(rewards)) return launch_on_cuda(rewards, FASTLOSS_CUDA_FUNCTION(ranking), args);
    const cpu::RankingKernel kernel = cpu::ranking_kernel.best();
    const int64_t grain = 16 * std::max<int64_t>(1, 2048 / std::max<int64_t>(args.n * args.n, 1));
    in_parallel(args.rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor rewards, Tensor ranks, int64_t kind) {
  RankingCall call(rewards, ranks, kind);
  RankingArgs& a = call.args;
  const int64_t rows[] = {a.rows}, state_shape[] = {a.rows, a.state_width()};
  const Tensor loss = empty(call.rewards, rows, call.accumulation);
  const Tensor pairs = empty(call.rewards, rows, call.accumulation);
  const Tensor state = empty(call.rewards, state_shape, call.accumulation);
  a.loss = loss.mutable_data_ptr();
  a.pairs = pairs.mutable_data_ptr();
  a.state = state.mutable_data_ptr();
  call.run();
  return {loss, pairs, state};
}

// The number of pairs has no gradient.
Tensor backward(Tensor grad, OptionalTensor /*grad_pairs*/, Tensor rewards, Tensor ranks, Tensor state,
                int64_t kind) {
  RankingCall call(rewards, ranks, kind);
  RankingArgs& a = call.args;
  const Tensor g = contiguous_as(grad, call.accumulation);
  FL_CHECK(g.numel() == a.rows, "grad: expected one number for each of ", a.rows, " rows");
  const Tensor gradient = empty_pooled(call.rewards, call.rewards.sizes(), call.rewards.scalar_type());
  a.backward = true;
  a.upstream = g.const_data_ptr();
  a.state = const_cast<void*>(state.const_data_ptr());
  a.gradient = gradient.mutable_data_ptr();
  call.run();
  return gradient;
}

void define(StableLibrary& m) {
  m.def("ranking_fwd(Tensor rewards, Tensor ranks, int kind) -> (Tensor loss, Tensor pairs, Tensor state)");
  m.def(
      "ranking_bwd(Tensor grad, Tensor? grad_pairs, Tensor rewards, Tensor ranks, Tensor state, int kind) -> "
      "Tensor");
}
void implement(StableLibrary& m) {
  m.impl("ranking_fwd", TORCH_BOX(&forward));
  m.impl("ranking_bwd", TORCH_BOX(&backward));
}

}  // namespace

FASTLOSS_OPERATORS(define, implement)

}  // namespace fastloss
