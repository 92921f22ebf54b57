// Alignments for one instruction set: compiled once for each, with FL_ISA naming it. A thread takes a
// sequence; a vector holds neighbouring positions of the target, or classes.
#include "ctc.h"

#include <cstring>

#include "../../losses/ctc.h"
#include "../../math/math.h"
#include "../scratch.h"

namespace fastloss::inline FL_ISA {
namespace {

template <class T>
class AlignmentKernel {
  using R = acc_t<T>;
  using F = vector_t<R>;
  static constexpr int W = kLanes<F>;

 public:
  explicit AlignmentKernel(const AlignmentArgs& args) : a_(args), width_(2 * args.width + 1) {
    const int64_t row = (width_ + 3 * W) / W * W, classes = (a_.classes + W) / W * W;
    R* p = static_cast<R*>(cpu::thread_scratch((5 * row + classes) * sizeof(R)));
    row_[0] = p + W, row_[1] = p + row + W;  // padded on both sides by -infinity
    p += 2 * row;
    y_ = p, skip_ = p + row, posterior_ = p + 2 * row, found_ = p + 3 * row;
    for (int64_t k = 0; k < classes; ++k) found_[k] = 0;
  }
  FL_FN void run(int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) a_.backward ? backward(n) : forward(n);
  }

 private:
  FL_FN const T* input(int64_t t, int64_t n) const {
    return static_cast<const T*>(a_.input) + t * a_.input_strides[0] + n * a_.input_strides[1];
  }
  FL_FN T* gradient(int64_t t, int64_t n) const {
    return static_cast<T*>(a_.gradient) + t * a_.gradient_strides[0] + n * a_.gradient_strides[1];
  }
  FL_FN R* alpha(int64_t t, int64_t n) const {
    return static_cast<R*>(a_.alpha) + (n * a_.steps + t) * width_;
  }
  FL_FN R& taken_off(int64_t t, int64_t n) const { return static_cast<R*>(a_.rows)[t * a_.batch + n]; }
  FL_FN R& normalizer(int64_t t, int64_t n) const { return taken_off(a_.steps + t, n); }
  FL_FN void clear(R* row, int64_t positions) const {
    for (int64_t s = -W; s < 0; ++s) row[s] = -R(INFINITY);
    for (int64_t s = positions; s < positions + W; ++s) row[s] = -R(INFINITY);
  }
  FL_FN F classes_at(const T* x, int64_t k, R pad) const {
    return k + W <= a_.classes ? load(x + k) : load_part(x + k, a_.classes - k, pad);
  }

  FL_NOINLINE R log_sum_exp(const T* x) const {
    F top = fill<F>(-R(INFINITY)), sum{};
    for (int64_t k = 0; k < a_.classes; k += W) top = max(classes_at(x, k, -R(INFINITY)), top);
    R m = horizontal_max(top);
    m = m > -R(INFINITY) ? m : R(0);
    for (int64_t k = 0; k < a_.classes; k += W) sum += exp(classes_at(x, k, -R(INFINITY)) - m);
    return m + log(horizontal_sum(sum));
  }
  FL_FN void gather(const AlignedTarget& target, int64_t t, int64_t n) {
    const T* const x = input(t, n);
    const R blank = widen(x[target.blank]), off = taken_off(t, n);
    for (int64_t i = 0; i < target.length; ++i) {
      y_[2 * i] = blank - off;
      y_[2 * i + 1] = widen(x[target.labels[i]]) - off;
    }
    y_[target.positions - 1] = blank - off;
  }
  FL_FN R largest_of(const AlignedTarget& target, const T* x) const {
    R top = max(R(widen(x[target.blank])), -R(INFINITY));
    for (int64_t i = 0; i < target.length; ++i) top = max(R(widen(x[target.labels[i]])), top);
    return top > -R(INFINITY) ? top : R(0);
  }
  FL_FN void mark_skips(const AlignedTarget& target, int64_t shift) {
    for (int64_t s = 0; s < target.positions + W; ++s)
      skip_[s] = s < target.positions && target.skips(s + shift) ? R(0) : -R(INFINITY);
  }

  FL_NOINLINE void forward(int64_t n) {
    const AlignedTarget target(a_, n);
    mark_skips(target, 0);
    R *now = row_[0], *before = row_[1];
    double log_scale = 0;
    for (int64_t t = 0; t < target.steps; ++t) {
      log_scale -= taken_off(t, n) = largest_of(target, input(t, n));
      if (a_.from_logits) log_scale += normalizer(t, n) = log_sum_exp(input(t, n));
      gather(target, t, n);
      clear(before, target.positions);
      if (t == 0) {
        for (int64_t s = 0; s < target.positions; ++s) now[s] = y_[s] - (s < 2 ? R(0) : R(INFINITY));
      } else {
        for (int64_t s = 0; s < target.positions; s += W)
          store(now + s, load(y_ + s) + log_sum(load(before + s), load(before + s - 1),
                                                load(before + s - 2) + load(skip_ + s)));
      }
      std::memcpy(alpha(t, n), now, target.positions * sizeof(R));
      R* const swap = now;
      now = before, before = swap;
    }
    R loss = R(log_scale - target.likelihood(before));
    if (a_.zero_infinity && loss == R(INFINITY)) loss = 0;
    static_cast<R*>(a_.loss)[n] = loss;
  }

  FL_NOINLINE void backward(int64_t n) {
    const AlignedTarget target(a_, n);
    const R g = static_cast<const R*>(a_.upstream)[n];
    const R likelihood = target.likelihood(target.steps ? alpha(target.steps - 1, n) : nullptr);
    const bool none = likelihood == -R(INFINITY);
    for (int64_t t = none && a_.zero_infinity ? 0 : target.steps; t < a_.steps; ++t)
      std::memset(gradient(t, n), 0, a_.classes * sizeof(T));
    if (none && a_.zero_infinity) return;
    mark_skips(target, 2);
    R *now = row_[0], *behind = row_[1];
    for (int64_t t = target.steps - 1; t >= 0; --t) {
      gather(target, t, n);
      clear(behind, target.positions);
      const R* const from_start = alpha(t, n);
      for (int64_t s = 0; s < target.positions; s += W) {
        F ahead;
        if (t == target.steps - 1) {
          const auto end = lane_numbers<F>() >= lane_number(target.positions - 2 - s);
          ahead = select(end, F{}, fill<F>(-R(INFINITY)));
        } else {
          ahead = log_sum(load(behind + s), load(behind + s + 1), load(behind + s + 2) + load(skip_ + s));
        }
        const int64_t left = target.positions - s;
        const F start = left < W ? load_part(from_start + s, left, -R(INFINITY)) : load(from_start + s);
        store(posterior_ + s, posterior(start, ahead, likelihood));
        store(now + s, beta(ahead, load(y_ + s)));
      }
      for (int64_t s = 0; s < target.positions; ++s) found_[target.label(s)] += posterior_[s];
      write(gradient(t, n), input(t, n), t, n, none ? R(NAN) : g);
      for (int64_t s = 0; s < target.positions; ++s) found_[target.label(s)] = 0;
      R* const swap = now;
      now = behind, behind = swap;
    }
  }
  FL_FN static auto lane_number(int64_t i) {
    using Lane = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
    return static_cast<Lane>(i < -W ? -W : (i > W ? W : i));
  }
  FL_FN void write(T* out, const T* x, int64_t t, int64_t n, R g) const {
    const R z = a_.from_logits ? normalizer(t, n) : R(0);
    for (int64_t k = 0; k < a_.classes; k += W) {
      const F p = a_.from_logits ? exp(classes_at(x, k, -R(INFINITY)) - z) : F{};
      const F d = g * (p - load(found_ + k));
      k + W <= a_.classes ? store(out + k, d) : store_part(out + k, d, a_.classes - k);
    }
  }

  const AlignmentArgs& a_;
  const int64_t width_;
  R* row_[2];                           // alphas, or betas, of two steps
  R *y_, *skip_, *posterior_, *found_;  // by position; found_ [classes]: sums of posteriors
};

void run(const AlignmentArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T> { AlignmentKernel<T>(a).run(begin, end); });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
FASTLOSS_OF_ISA(AlignmentKernel, alignment_kernel) = &run;
}  // namespace fastloss::cpu
