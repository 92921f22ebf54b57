// Losses of rows of logits on the CPU: value and gradient in one sweep over memory.
//
// A row is taken in blocks that fit in the L1 cache. Each block is searched for its maximum, then its
// exponentials are summed relative to the running maximum while the next block is prefetched. For the
// gradient they also go to a scratch row in the L2 cache, from which they are scaled and written: with
// streaming stores where the output is larger than the caches, and then while the next row is summed, so
// that arithmetic and memory traffic overlap. No softmax is stored, only two scratch rows a thread. The
// backward pass repeats the same arithmetic from the saved statistics, so that both ways give the same bits.
//
// row_reader.h      a row's inputs, its logits, the maximum of a block
// row_extras.h      several outputs, log-probabilities of chosen classes, number tokens
// row_gradient.h    the gradient from a row's exponentials
// row_sums.h        the sums, and the pending gradient of the row before
// here              scratch memory, and a row from its first load to its gradient
#pragma once
#include <utility>

#include "../scratch.h"
#include "row_sums.h"

namespace fastloss::inline FL_ISA {

template <class Loss, class T>
class RowKernel : RowSums<Loss, T> {
  using Base = RowSums<Loss, T>;
  using Base::a_, Base::loss_, Base::n_, Base::W, Base::kBlock, Base::kMayDefer;
  using Base::logit, Base::accumulate, Base::gradient, Base::write, Base::write_zeros;
  using Base::number_logits_, Base::number_dense_, Base::number_self_;
  using Base::other_exps_, Base::other_bases_, Base::pending_, Base::has_pending_;
  using Base::staged_x_, Base::staged_q_, Base::staged_dx_, Base::exps_, Base::bases_;
  using typename Base::R, typename Base::F, typename Base::Row, typename Base::Gradient;

 public:
  FL_FN RowKernel(const RowArgs& args, const Loss& loss) : Base(args, loss) {
    const int64_t blocks = (n_ + kBlock - 1) / kBlock, padded = (n_ + 2 * W) / W * W;
    const int64_t exps = args.pass == RowPass::forward_gradient ? padded * sizeof(R) : 0;  // bytes, as below
    const int64_t saved = exps + blocks * sizeof(R);
    const int64_t staged = padded * sizeof(T), numbers = (args.num_number_tokens + W - 1) / W * W * sizeof(R);
    char* p = static_cast<char*>(cpu::thread_scratch(2 * saved + 3 * staged + 3 * numbers + 64));
    exps_ = reinterpret_cast<R*>(p);
    other_exps_ = reinterpret_cast<R*>(p + exps);
    p += 2 * exps;
    bases_ = reinterpret_cast<R*>(p);
    other_bases_ = bases_ + blocks;
    p += 2 * blocks * sizeof(R);
    staged_x_ = reinterpret_cast<T*>(p);
    staged_q_ = reinterpret_cast<T*>(p + staged);
    staged_dx_ = reinterpret_cast<T*>(p + 2 * staged);
    number_logits_ = reinterpret_cast<R*>(p + 3 * staged);
    number_dense_ = number_logits_ + numbers / sizeof(R);
    number_self_ = number_dense_ + numbers / sizeof(R);
  }

  FL_FN void run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
    if (has_pending_) write(pending_);
    if (a_.past_cache) _mm_sfence();
  }

 private:
  FL_NOINLINE void row(int64_t r) {
    R* state = static_cast<R*>(a_.state) + r * a_.state_width;
    Row row{};
    row.t = a_.target ? a_.target[r] : -1;
    T* dx = a_.dx ? static_cast<T*>(a_.dx) + a_.dx_layout.start(r) : nullptr;
    R k = a_.pass == RowPass::backward ? state[2] : this->row_weight(r, row.t);
    if (k == 0) {
      if (a_.pass != RowPass::backward) {
        for (int64_t i = 0; i < a_.state_width; ++i) state[i] = 0;
        if constexpr (Loss::kOutputs) {
          for (int64_t i = 0; i < a_.num_outputs; ++i) this->outputs(r)[i] = 0;
        } else {
          static_cast<R*>(a_.loss)[r] = 0;
        }
      }
      if (dx) write_zeros(dx);
      return;
    }
    row.x = this->contiguous(static_cast<const T*>(a_.x), a_.x_layout, r, staged_x_);
    row.q = a_.q ? this->contiguous(static_cast<const T*>(a_.q), a_.q_layout, r, staged_q_) : nullptr;
    row.target.hard = a_.target;
    row.target.weight = a_.target ? this->class_weight(row.t) : 1;
    const R zt = a_.target ? logit(fill<F>(widen(row.x[row.t])))[0] : 0;
    R g = 1;
    if (a_.pass == RowPass::backward) {
      row.state.m = state[0];
      row.state.log_sum = state[1];
      for (int i = 0; i < Loss::kSaved; ++i) row.state.saved[i] = state[kStateHead + i];
      row.target.d = zt - row.state.m;
      if constexpr (!Loss::kOutputs) g = static_cast<const R*>(a_.upstream)[r * a_.upstream_stride];
      if constexpr (Loss::kNumberTokens) this->number_term(row, r);
    } else {
      if constexpr (Loss::kOutputs) {
        accumulate(row, zt);
        loss_.write(row.state, this->outputs(r));
        this->write_index_logps(row, r);
      } else {
        R value = accumulate(row, zt);
        if constexpr (Loss::kNumberTokens) value += this->number_term(row, r);
        static_cast<R*>(a_.loss)[r] = k * value;
      }
      if (a_.norm) k /= *static_cast<const R*>(a_.norm);
      state[0] = row.state.m;
      state[1] = row.state.log_sum;
      state[2] = k;
      for (int i = 0; i < a_.state_width - kStateHead; ++i)
        state[kStateHead + i] = i < Loss::kSaved ? row.state.saved[i] : 0;
    }
    if (!dx) return;
    T* out = a_.dx_layout.class_stride == 1 ? dx : staged_dx_;
    const Gradient now = gradient(row, r, out, g * k);
    if constexpr (kMayDefer)
      if (a_.pass == RowPass::forward_gradient && a_.past_cache && out == dx) {
        pending_ = now;
        has_pending_ = true;
        std::swap(exps_, other_exps_);
        std::swap(bases_, other_bases_);
        return;
      }
    write(now);
    if constexpr (Loss::kOutputs) this->write_index_gradient(row, r, out);
    if (out != dx)
      for (int64_t j = 0; j < n_; ++j) dx[j * a_.dx_layout.class_stride] = out[j];
  }
};

template <class Loss, class T>
FL_FN void run_rows(const RowArgs& args, int64_t begin, int64_t end) {
  RowKernel<Loss, T>(args, Loss(args.hparams, args.n)).run(begin, end);
}

}  // namespace fastloss::inline FL_ISA
