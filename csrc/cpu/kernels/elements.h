// Elementwise losses on the CPU: a block of elements at a time, value and gradients in one sweep.
//
// The loss sees blocks of the accumulation type: the input itself if it has that type, else a copy in the L1
// cache, converted, broadcast or expanded from classes. Outputs take the same route back, with streaming
// stores if they are large. So a formula is compiled for float and double only; inputs are read once,
// outputs written once, and nothing else is stored. A block's sum has a fixed order, whichever thread
// computes it.
#pragma once
#include <bit>

#include "../../drivers/elements.h"
#include "../../math/math.h"
#include "../scratch.h"

namespace fastloss::inline FL_ISA {

template <class R>
struct Block {
  const R* in[kMaxInputs];
  const R *weight, *upstream;  // null: 1
  R k;                         // factor of the gradients
  int64_t count;               // a multiple of the lanes of a pair of vectors
  R *value, *u;                // value only, or value and u of a log-sum
  R* dx[kMaxInputs];
};

// Each step of the loss for the whole block, before the next step.
template <int kStep = 0, class F, class Loss, class R>
FL_FN void step_block(const Loss& loss, const Block<R>& b, R (*steps)[kElementBlock]) {
  if constexpr (kStep < kStepsOf<Loss>) {
    for (int64_t i = 0; i < b.count; i += kLanes<F>) {
      F v[Loss::kInputs], t[kStepsOf<Loss>];
      for (int j = 0; j < Loss::kInputs; ++j) v[j] = load_pair(b.in[j] + i);
      for (int j = 0; j < kStep; ++j) t[j] = load_pair(steps[j] + i);
      store(steps[kStep] + i, loss.template step<kStep>(v, t));
    }
    step_block<kStep + 1, F>(loss, b, steps);
  }
}

// kGrad: the inputs to differentiate, a bit for each.
template <class Loss, class R, bool kValue, unsigned kGrad>
FL_NOINLINE void map_block(const double* hparams, const Block<R>& b) {
  using F = VectorPair<vector_t<R>>;
  const Loss loss(hparams);
  const F k = fill<F>(b.k);
  alignas(64) R steps[kStepsOf<Loss> + 1][kElementBlock];
  step_block<0, F>(loss, b, steps);
  for (int64_t i = 0; i < b.count; i += kLanes<F>) {
    F v[Loss::kInputs], t[kStepsOf<Loss> + 1], d[Loss::kInputs], u{};
    for (int j = 0; j < Loss::kInputs; ++j) v[j] = load_pair(b.in[j] + i);
    for (int j = 0; j < kStepsOf<Loss>; ++j) t[j] = load_pair(steps[j] + i);
    F value = evaluate(loss, v, t, d, u);
    const F w = b.weight ? load_pair(b.weight + i) : fill<F>(1);
    if constexpr (kValue) {
      if (Loss::kLogSum && b.u) {
        store(b.u + i, u);
      } else {
        if constexpr (Loss::kLogSum) value += log1p_unit(u);
        if (b.weight) value = select(w != 0, w * value, F{});
      }
      store(b.value + i, value);
    }
    if constexpr (kGrad != 0) {
      const F g = (b.upstream ? k * load_pair(b.upstream + i) : k) * w;
      for (int j = 0; j < Loss::kInputs; ++j)
        if ((kGrad >> j & 1) && b.dx[j]) {
          const F dx = gradient_of<Loss>(d[j], g);
          store(b.dx[j] + i, b.weight ? select(w != 0, dx, F{}) : dx);
        }
    }
  }
}

template <class Loss, class R>
struct Mapping {
  static constexpr unsigned kFirst = 1u << std::countr_zero(Loss::kWrt);
  // for want = 1: value, 2: gradient of the first differentiable input, 4: of more
  static auto choose(bool value, unsigned grad) {
    using Function = void (*)(const double*, const Block<R>&);
    if (!grad) return Function{&map_block<Loss, R, true, 0>};
    if (!(grad & ~kFirst))
      return value ? Function{&map_block<Loss, R, true, kFirst>}
                   : Function{&map_block<Loss, R, false, kFirst>};
    return value ? Function{&map_block<Loss, R, true, Loss::kWrt>}
                 : Function{&map_block<Loss, R, false, Loss::kWrt>};
  }
};

// In four independent sums, added pairwise.
template <class R>
FL_FN double sum_block(const R* value, int64_t count) {
  using F = vector_t<R>;
  F s[4] = {};
  for (int64_t i = 0; i < count; i += kLanes<F>) s[i / kLanes<F> % 4] += load(value + i);
  return horizontal_sum((s[0] + s[1]) + (s[2] + s[3]));
}
// sum of log(1 + u) as the logarithm of a product; kept as product - 1, since 1 + u loses digits of a small
// u.
template <class R>
FL_FN double log1p_sum(const R* u, int64_t count) {
  using F = vector_t<R>;
  constexpr int kFactors = 32;  // below 2^32
  F s{};
  for (int64_t i = 0; i < count;) {
    const int64_t end = i + kFactors * kLanes<F> < count ? i + kFactors * kLanes<F> : count;
    F product{};
    for (; i < end; i += kLanes<F>) {
      const F factor = load(u + i);
      product = fma(product, factor, product + factor);
    }
    s += log1p(product);
  }
  return horizontal_sum(s);
}

template <class T>
class ElementKernel {
  using R = acc_t<T>;
  using F = vector_t<R>;
  using Map = void (*)(const double*, const Block<R>&);
  static constexpr int W = kLanes<F>, kStep = 2 * W;
  static constexpr int64_t kBlock = kElementBlock;

 public:
  ElementKernel(const ElementArgs& args, int inputs, bool log_sum, Map map)
      : a_(args), inputs_(inputs), map_(map), sum_logs_(log_sum && args.partial && !args.weight.p) {
    stage_ = static_cast<R*>(cpu::thread_scratch((2 * kMaxInputs + 4) * kBlock * sizeof(R)));
  }

  void run(int64_t begin, int64_t end) {
    R k = R(a_.scale);
    if (a_.norm) k /= *static_cast<const R*>(a_.norm);
    const bool one_upstream = a_.upstream.p && a_.upstream.period == 1;
    if (one_upstream) k *= number(a_.upstream, 0);
    for (int64_t i = begin; i < end; ++i) block(i, k, one_upstream);
    if (a_.past_cache) _mm_sfence();
  }

 private:
  FL_NOINLINE void block(int64_t index, R k, bool one_upstream) {
    const int64_t begin = index * kBlock, count = begin + kBlock < a_.n ? kBlock : a_.n - begin;
    Block<R> b{};
    b.count = (count + kStep - 1) / kStep * kStep;
    b.k = k;
    R* stage = stage_;
    const auto staged = [&] {
      R* p = stage;
      stage += kBlock;
      return p;
    };
    for (int j = 0; j < inputs_; ++j) b.in[j] = fetch(a_.inputs[j], begin, count, staged());
    if (a_.weight.p) b.weight = fetch(a_.weight, begin, count, staged());
    if (a_.upstream.p && !one_upstream) b.upstream = fetch(a_.upstream, begin, count, staged());
    const bool direct = !a_.past_cache && count == b.count;
    const bool acc_out = a_.out_acc || sizeof(T) == sizeof(R);
    R* const value = a_.out && acc_out && direct ? static_cast<R*>(a_.out) + begin : staged();
    if (a_.out || a_.partial) b.value = value;
    if (sum_logs_) b.u = staged();
    for (int j = 0; j < inputs_; ++j)
      if (a_.dx[j]) b.dx[j] = sizeof(T) == sizeof(R) && direct ? static_cast<R*>(a_.dx[j]) + begin : staged();
    map_(a_.hparams, b);

    if (a_.partial) {
      clear_tail(value, count, b.count);
      a_.partial[index] = sum_block(value, b.count);
      if (sum_logs_) {
        clear_tail(b.u, count, b.count);
        a_.partial[index] += log1p_sum(b.u, b.count);
      }
    }
    if (a_.out) {
      if (acc_out) {
        write(static_cast<R*>(a_.out) + begin, value, count);
      } else {
        write(static_cast<T*>(a_.out) + begin, value, count);
      }
    }
    for (int j = 0; j < inputs_; ++j)
      if (a_.dx[j]) write(static_cast<T*>(a_.dx[j]) + begin, b.dx[j], count);
  }
  static void clear_tail(R* p, int64_t count, int64_t padded) {
    for (int64_t i = count; i < padded; ++i) p[i] = 0;
  }

  // ---- inputs
  FL_FN R number(const ElementInput& x, int64_t i) const {
    if (x.source == Source::flag) return static_cast<const uint8_t*>(x.p)[i] ? 1 : 0;
    return x.source == Source::accumulation ? static_cast<const R*>(x.p)[i]
                                            : widen(static_cast<const T*>(x.p)[i]);
  }
  template <class S>
  FL_FN static void copy(const S* from, int64_t count, R* to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, load(from + i));
    if (i < count) store(to + i, load_part(from + i, count - i, R(0)));
  }
  // Elements begin, begin + 1, ... as R, padded to whole vectors: where they lie, or in `to`.
  const R* fetch(const ElementInput& x, int64_t begin, int64_t count, R* to) const {
    const bool flat = x.inner == 1 && x.period >= a_.n;
    if (x.source == Source::one_hot || x.source == Source::not_ignored) {
      from_classes(x, begin, count, to);
    } else if (flat && x.source == Source::flag) {
      const uint8_t* p = static_cast<const uint8_t*>(x.p) + begin;
      for (int64_t i = 0; i < count; ++i) to[i] = p[i] ? 1 : 0;
    } else if (flat && (x.source == Source::accumulation || sizeof(T) == sizeof(R))) {
      const R* p = static_cast<const R*>(x.p) + begin;
      if (count % kStep == 0) return p;
      copy(p, count, to);
    } else if (flat) {
      copy(static_cast<const T*>(x.p) + begin, count, to);
    } else {  // runs of `inner` equal numbers; if inner is 1, repeated periods
      int64_t within = begin % x.inner, at = begin / x.inner % x.period;
      for (int64_t i = 0; i < count;) {
        const int64_t whole = x.period == 1 ? count : x.inner == 1 ? x.period - at : x.inner - within;
        const int64_t end = i + whole < count ? i + whole : count;
        if (x.inner == 1 && x.period > 1) {
          for (; i < end; ++i) to[i] = number(x, at++);
        } else {
          const R v = number(x, at++);
          for (; i < end; ++i) to[i] = v;
        }
        within = 0;
        if (at == x.period) at = 0;
      }
    }
    for (int64_t i = count; i % kStep; ++i) to[i] = to[count - 1];
    return to;
  }
  void from_classes(const ElementInput& x, int64_t begin, int64_t count, R* to) const {
    const int64_t* classes = static_cast<const int64_t*>(x.p);
    int64_t row = begin / x.inner,
            first = row * x.inner - begin;  // of the row's elements, counted from begin
    for (; first < count; ++row, first += x.inner) {
      const int64_t from = first > 0 ? first : 0, to_end = first + x.inner < count ? first + x.inner : count;
      const bool here = x.source == Source::not_ignored && classes[row] != a_.ignore_index;
      for (int64_t i = from; i < to_end; ++i) to[i] = here ? 1 : 0;
      const int64_t hit = first + classes[row];
      const bool positive = x.source == Source::one_hot && classes[row] != a_.background_index;
      if (positive && classes[row] >= 0 && hit >= from && hit < to_end) to[hit] = 1;
    }
  }

  // ---- outputs
  template <class S>
  FL_FN void write(S* to, const R* from, int64_t count) const {
    if constexpr (sizeof(S) == sizeof(R))
      if (reinterpret_cast<const R*>(to) == from) return;
    int64_t i = 0;
    if (a_.past_cache && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
      for (; i + W <= count; i += W) stream(to + i, load(from + i));
    } else {
      for (; i + W <= count; i += W) store(to + i, load(from + i));
    }
    if (i < count) store_part(to + i, load(from + i), count - i);
  }

  const ElementArgs& a_;
  const int inputs_;
  const Map map_;
  const bool sum_logs_;
  R* stage_;
};

template <template <class, int> class Loss, int kVariant, class T>
void run_elements(const ElementArgs& a, int64_t begin, int64_t end) {
  using R = acc_t<T>;
  using L = Loss<R, kVariant>;
  unsigned wanted = 0;
  for (int j = 0; j < L::kInputs; ++j) wanted |= a.dx[j] ? 1u << j : 0;
  const auto map = Mapping<L, R>::choose(a.out || a.partial, wanted);
  ElementKernel<T>(a, L::kInputs, L::kLogSum, map).run(begin, end);
}

}  // namespace fastloss::inline FL_ISA
