// Recursions in time on the CPU: as many sequences at once as a vector has lanes.
//
// Steps are taken in square tiles: a vector of consecutive steps of each sequence is loaded, the tile is
// transposed in registers, the recursion runs over it with one sequence a lane, and the results go back the
// same way. Lanes never mix, so a sequence's result does not depend on its neighbours.
#pragma once
#include <utility>

#include "../../drivers/scan.h"
#include "../../math/math.h"

namespace fastloss::inline FL_ISA {

// Transposes a square tile: at each stage, blocks of size h are exchanged across the diagonal.
template <int h, class F, int... I>
FL_FN void transpose_stage(F* m, std::integer_sequence<int, I...>) {
  constexpr int W = kLanes<F>;
  using Index = decltype(lane_numbers<F>());
  constexpr Index low{(I & h ? W + I - h : I)...}, high{(I & h ? W + I : I + h)...};
  for (int i = 0; i < W; ++i) {
    if (i & h) continue;
    const F a = m[i], b = m[i + h];
    m[i] = __builtin_shuffle(a, b, low);
    m[i + h] = __builtin_shuffle(a, b, high);
  }
}
template <int h, class F>
FL_FN void transpose(F* m) {
  transpose_stage<h>(m, std::make_integer_sequence<int, kLanes<F>>{});
  if constexpr (h > 1) transpose<h / 2>(m);
}

template <class F>
FL_FN F load_flags(const uint8_t* p, int64_t count) {
  F v{};
  for (int k = 0; k < kLanes<F>; ++k) v[k] = k < count && p[k] ? 1 : 0;
  return v;
}

template <class Loss, class T>
class ScanKernel {
  using R = acc_t<T>;
  using F = vector_t<R>;
  static constexpr int W = kLanes<F>;

 public:
  FL_FN explicit ScanKernel(const ScanArgs& args) : a_(args), loss_(args) {}

  FL_FN void run(int64_t begin, int64_t end) {
    const bool brief = !a_.offsets && a_.n < W;
    for (int64_t r = begin; r < end; r += W) {
      lanes_ = end - r < W ? end - r : W;
      F u{};
      if (a_.initial)
        for (int l = 0; l < lanes_; ++l) u[l] = widen(static_cast<const T*>(a_.initial)[r + l]);
      if (!brief) place_rows(r, end);
      if (!a_.backward) {
        if (brief) {
          forward_brief(r, u);
        } else {
          forward(u);
        }
      } else if constexpr (Loss::kBackward) {
        const F w = brief ? backward_brief(r) : backward();
        if (a_.initial_grad)
          for (int l = 0; l < lanes_; ++l) store_one(static_cast<T*>(a_.initial_grad) + r + l, w[l]);
      }
    }
  }

 private:
  FL_FN void place_rows(int64_t r, int64_t end) {
    longest_ = 0;
    for (int l = 0; l < W; ++l) {  // unused lanes repeat the last sequence and store nothing
      const int64_t row = l < lanes_ ? r + l : end - 1;
      start_[l] = a_.offsets ? a_.offsets[row] : row * a_.n;
      length_[l] = a_.offsets ? a_.offsets[row + 1] - start_[l] : a_.n;
      longest_ = length_[l] > longest_ ? length_[l] : longest_;
    }
  }

  // The part of each sequence that a tile holds: `at` in memory, `count` steps, the first in tile row `skip`.
  struct Tile {
    int64_t at[W];
    int count[W], skip[W];
    bool full;
  };
  FL_FN Tile tile(int64_t done, bool from_end) const {
    Tile t;
    t.full = true;
    for (int l = 0; l < W; ++l) {
      const int64_t left = length_[l] - done;
      t.count[l] = left >= W ? W : (left > 0 ? int(left) : 0);
      t.skip[l] = from_end ? W - t.count[l] : 0;
      t.at[l] = start_[l] + (from_end ? (left > W ? left - W : 0) : (left > 0 ? done : 0));
      t.full &= t.count[l] == W;
    }
    return t;
  }
  FL_FN static F shifted(F v, int skip) {  // lane k to lane k + skip
    R buffer[2 * W] = {};
    store(buffer + skip, v);
    return load(buffer);
  }
  FL_FN void read(const Tile& t, const void* base, F* m) const {
    if (!base) {
      for (int k = 0; k < W; ++k) m[k] = F{};
      return;
    }
    for (int l = 0; l < W; ++l) {
      const T* p = static_cast<const T*>(base) + t.at[l];
      m[l] = t.full ? load(p) : shifted(load_part(p, t.count[l], R(0)), t.skip[l]);
    }
    transpose<W / 2>(m);
  }
  FL_FN void read_flags(const Tile& t, const uint8_t* base, R absent, F* m) const {
    if (!base && (absent == 0 || t.full)) {
      for (int k = 0; k < W; ++k) m[k] = fill<F>(absent);
      return;
    }
    for (int l = 0; l < W; ++l) {
      const F v = base ? load_flags<F>(base + t.at[l], t.count[l])
                       : select(first_lanes<F>(t.count[l]), fill<F>(1), F{});
      m[l] = t.full ? v : shifted(v, t.skip[l]);
    }
    transpose<W / 2>(m);
  }
  FL_FN void write(const Tile& t, void* base, F* m) const {
    if (!base) return;
    transpose<W / 2>(m);
    for (int l = 0; l < lanes_; ++l) {
      T* p = static_cast<T*>(base) + t.at[l];
      if (t.full) {
        store(p, m[l]);
      } else if (t.count[l]) {
        T buffer[W];
        store(buffer, m[l]);
        std::memcpy(p, buffer + t.skip[l], t.count[l] * sizeof(T));
      }
    }
  }

  struct Streams {
    F in[kScanInputs][W], grad[kScanGrads][W], terminated[W], truncated[W], mask[W];
    FL_FN ScanStep<F> at(int k) const {
      return {{in[0][k], in[1][k], in[2][k], in[3][k]},
              terminated[k],
              truncated[k],
              mask[k],
              {grad[0][k], grad[1][k]}};
    }
  };
  FL_FN void read_all(const Tile& t, Streams& s) const {
    for (int i = 0; i < kScanInputs; ++i) read(t, i < Loss::kInputs ? a_.in[i] : nullptr, s.in[i]);
    for (int i = 0; i < kScanGrads; ++i) read(t, a_.backward ? a_.grad[i] : nullptr, s.grad[i]);
    read_flags(t, a_.terminated, 0, s.terminated);
    read_flags(t, a_.truncated, 0, s.truncated);
    read_flags(t, a_.mask, 1, s.mask);
  }

  // Steps count - 1, ..., 0 of a tile.
  FL_FN void steps(const Streams& s, int64_t count, F& u, F& w, F (*out)[W]) const {
    for (int64_t k = count - 1; k >= 0; --k) {
      const ScanStep<F> x = s.at(k);
      const F u_before = u, w_before = w;
      loss_.step(x).apply(u, w);
      F o[Loss::kOutputs];
      loss_.output(x, u_before, w_before, u, w, o);
      for (int i = 0; i < Loss::kOutputs; ++i) out[i][k] = o[i];
    }
  }
  FL_FN void adjoint_steps(const Streams& s, int64_t count, F& u, F& w, F (*out)[W]) const {
    for (int64_t k = 0; k < count; ++k) {
      const ScanStep<F> x = s.at(k);
      F o[Loss::kGradients];
      loss_.gradient(x, u, w, o);
      loss_.adjoint(x).apply(u, w);
      for (int i = 0; i < Loss::kGradients; ++i) out[i][k] = o[i];
    }
  }

  FL_NOINLINE void forward(F u) {
    F w{}, out[Loss::kOutputs][W];
    Streams s;
    for (int64_t done = 0; done < longest_; done += W) {
      const Tile t = tile(done, true);
      read_all(t, s);
      steps(s, W, u, w, out);
      for (int i = 0; i < Loss::kOutputs; ++i) write(t, a_.out[i], out[i]);
    }
  }

  FL_NOINLINE F backward() {
    F u{}, w{}, out[Loss::kGradients][W];
    Streams s;
    for (int64_t done = 0; done < longest_; done += W) {
      const Tile t = tile(done, false);
      read_all(t, s);
      adjoint_steps(s, W, u, w, out);
      for (int i = 0; i < Loss::kGradients; ++i) write(t, a_.out[i], out[i]);
    }
    return w;
  }

  // ---- sequences of fewer steps than a vector has lanes: the rows of a group lie one behind the other
  FL_FN void read_brief(const void* base, int64_t r, F* m) const {
    const T* p = base ? static_cast<const T*>(base) + r * a_.n : nullptr;
    if (p && a_.n == 1 && lanes_ == W) {
      m[0] = load(p);
    } else if (p) {
      spread([p](int64_t i) __attribute__((always_inline)) { return R(widen(p[i])); }, m);
    } else {
      for (int64_t k = 0; k < a_.n; ++k) m[k] = F{};
    }
  }
  FL_FN void read_brief_flags(const uint8_t* base, int64_t r, R absent, F* m) const {
    const uint8_t* p = base ? base + r * a_.n : nullptr;
    if (p) {
      spread([p](int64_t i) __attribute__((always_inline)) { return p[i] ? R(1) : R(0); }, m);
    } else {
      for (int64_t k = 0; k < a_.n; ++k) m[k] = fill<F>(absent);
    }
  }
  // A count of steps that the compiler knows turns the loops into shuffles.
  template <int kSteps, class Number>
  FL_FN void spread_steps(Number number, R* to) const {
    for (int l = 0; l < W; ++l)
      for (int k = 0; k < kSteps; ++k) to[k * W + l] = number(l * kSteps + k);
  }
  template <class Number>
  FL_FN void spread(Number number, F* m) const {
    R* to = reinterpret_cast<R*>(m);
    if (lanes_ == W && a_.n == 1) return spread_steps<1>(number, to);
    if constexpr (W > 2)
      if (lanes_ == W && a_.n == 2) return spread_steps<2>(number, to);
    if constexpr (W > 4)
      if (lanes_ == W && a_.n == 4) return spread_steps<4>(number, to);
    for (int64_t l = 0; l < W; ++l)
      for (int64_t k = 0; k < a_.n; ++k) to[k * W + l] = l < lanes_ ? number(l * a_.n + k) : R(0);
  }
  FL_FN void write_brief(void* base, int64_t r, const F* m) const {
    if (!base) return;
    T* p = static_cast<T*>(base) + r * a_.n;
    if (a_.n == 1 && lanes_ == W) return store(p, m[0]);
    T rows[W][W];  // [step][sequence]
    for (int64_t k = 0; k < a_.n; ++k) store(rows[k], m[k]);
    if (a_.n == 2 && lanes_ == W) {
      for (int l = 0; l < W; ++l) p[2 * l] = rows[0][l], p[2 * l + 1] = rows[1][l];
      return;
    }
    for (int64_t l = 0; l < lanes_; ++l)
      for (int64_t k = 0; k < a_.n; ++k) p[l * a_.n + k] = rows[k][l];
  }
  FL_FN void read_all_brief(int64_t r, Streams& s) const {
    for (int i = 0; i < kScanInputs; ++i) read_brief(i < Loss::kInputs ? a_.in[i] : nullptr, r, s.in[i]);
    for (int i = 0; i < kScanGrads; ++i) read_brief(a_.backward ? a_.grad[i] : nullptr, r, s.grad[i]);
    read_brief_flags(a_.terminated, r, 0, s.terminated);
    read_brief_flags(a_.truncated, r, 0, s.truncated);
    read_brief_flags(a_.mask, r, 1, s.mask);
  }
  FL_NOINLINE void forward_brief(int64_t r, F u) {
    F w{}, out[Loss::kOutputs][W];
    Streams s;
    read_all_brief(r, s);
    steps(s, a_.n, u, w, out);
    for (int i = 0; i < Loss::kOutputs; ++i) write_brief(a_.out[i], r, out[i]);
  }
  FL_NOINLINE F backward_brief(int64_t r) {
    F u{}, w{}, out[Loss::kGradients][W];
    Streams s;
    read_all_brief(r, s);
    adjoint_steps(s, a_.n, u, w, out);
    for (int i = 0; i < Loss::kGradients; ++i) write_brief(a_.out[i], r, out[i]);
    return w;
  }

  const ScanArgs& a_;
  const Loss loss_;
  int64_t start_[W], length_[W], longest_ = 0, lanes_ = 0;
};

}  // namespace fastloss::inline FL_ISA
