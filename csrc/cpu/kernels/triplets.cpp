// All triplets of a batch (losses/triplets.h) for one instruction set: compiled once for each, with
// FL_ISA naming it.
#include "triplets.h"

#include "../../losses/triplets.h"
#include "../../math/math.h"
#include "../scratch.h"
#include "gemm.h"

namespace fastloss::inline FL_ISA {
namespace {

template <class R>
class Triplets {
  using F = vector_t<R>;
  static constexpr int W = kLanes<F>;
  static constexpr int kGroup = cpu::kTripletRows, kVectors = kGroup / W;
  static_assert(kGroup % W == 0);
  // independent sums, and the number of terms after which they are joined: short sums round less
  static constexpr int kChains = 4, kRun = 32;

 public:
  explicit Triplets(const TripletArgs& a) : a_(a), x_(static_cast<const R*>(a.x)) {}

  void pack(int64_t begin, int64_t end) const {
    const int64_t rows = (end * kGroup < a_.m ? end * kGroup : a_.m) - begin * kGroup;
    fastloss::pack<kGroup>(x_ + begin * kGroup * a_.d, a_.d, 1, rows, a_.d,
                           static_cast<R*>(a_.panels) + begin * kGroup * a_.d);
  }

  void anchor(int64_t r) const {
    const int64_t i = a_.row + r;
    R* const d = distances(r);
    measure(i, d);
    int64_t positives = 0;
    for (int64_t j = 0; j < a_.m; ++j) positives += a_.ids[j] == a_.ids[i];
    --positives;
    const int64_t negatives = a_.m - 1 - positives;
    double sum = 0, number = 0;
    if (positives > 0 && negatives > 0) {
      count(i, d, positives <= negatives, positives, negatives, sum, number);
    } else {
      for (int64_t j = 0; !a_.sums && j < a_.m; ++j) d[j] = 0;
    }
    if (a_.sums) {
      static_cast<R*>(a_.sums)[i] = R(sum);
      static_cast<R*>(a_.sums)[a_.m + i] = R(number);
    } else {
      d[i] = 0;
    }
  }

  void draw_anchor(int64_t r) const { draw(a_.row + r, distances(r), 1, x_, a_.m); }
  void draw_other(int64_t j) const { draw(j, distances(0) + j, a_.ld, x_ + a_.row * a_.d, a_.rows); }

 private:
  FL_FN R* distances(int64_t r) const { return static_cast<R*>(a_.distance) + r * a_.ld; }

  FL_NOINLINE void measure(int64_t i, R* d) const {
    const R* const anchor = x_ + i * a_.d;
    const R* panel = static_cast<const R*>(a_.panels);
    for (int64_t j = 0; j < a_.m; j += kGroup) {
      F total[kVectors] = {};
      for (int64_t k = 0; k < a_.d;) {
        const int64_t end = k + kRun < a_.d ? k + kRun : a_.d;
        F sum[kChains][kVectors] = {};
        while (k < end)
          for (int c = 0; c < kChains && k < end; ++c, ++k, panel += kGroup)
            for (int v = 0; v < kVectors; ++v) {
              const F gap = anchor[k] - load(panel + v * W);
              sum[c][v] += gap * gap;
            }
        for (int v = 0; v < kVectors; ++v) total[v] += (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
      }
      for (int v = 0; v < kVectors; ++v) store(d + j + v * W, a_.root ? sqrt(total[v]) : total[v]);
    }
  }

  // Sorts the smaller group; each member of the larger finds its place by binary search.
  FL_NOINLINE void count(int64_t i, R* d, bool few_positives, int64_t positives, int64_t negatives,
                         double& sum, double& number) const {
    const int64_t few = few_positives ? positives : negatives, many = a_.m - 1 - few;
    auto* perm =
        static_cast<int64_t*>(cpu::thread_scratch((3 * few + 1) * sizeof(int64_t) + 2 * few * sizeof(R)));
    int64_t *const spare_perm = perm + few, *const counts = spare_perm + few;
    R *keys = reinterpret_cast<R*>(counts + few + 1), *const spare = keys + few;
    const R margin = R(a_.margin), up = a_.sums ? R(0) : static_cast<const R*>(a_.grad)[i];
    const auto key = [&](int64_t j, bool positive) {
      return positive ? positive_key(d[j], margin) : negative_key(d[j]);
    };
    const auto counted = [&](int64_t j, bool positive, int64_t times) {
      if (times && positive) sum += double(times) * (double(d[j]) + a_.margin), number += double(times);
      if (times && !positive) sum -= double(times) * double(d[j]);
      if (!a_.sums) d[j] = times ? triplet_weight(d[j], (positive ? up : -up) * R(times), a_.root) : R(0);
    };
    int64_t n = 0;
    for (int64_t j = 0; j < a_.m; ++j)
      if (j != i && (a_.ids[j] == a_.ids[i]) == few_positives) keys[n] = key(j, few_positives), perm[n++] = j;
    sort(keys, perm, few, spare, spare_perm);
    for (int64_t k = 0; k <= few; ++k) counts[k] = 0;
    for (int64_t j = 0; j < a_.m; ++j) {
      if (j == i || (a_.ids[j] == a_.ids[i]) == few_positives) continue;
      const int64_t below = count_below(keys, few, key(j, !few_positives), few_positives);
      ++counts[below];
      counted(j, !few_positives, few_positives ? few - below : below);
    }
    int64_t before = 0;
    for (int64_t k = 0; k < few; ++k) {
      before += counts[k];
      counted(perm[k], few_positives, few_positives ? before : many - before);
    }
  }

  // Merges runs of 1, 2, 4, ...
  static void sort(R*& keys, int64_t*& perm, int64_t n, R* spare, int64_t* spare_perm) {
    for (int64_t run = 1; run < n; run *= 2) {
      for (int64_t begin = 0; begin < n; begin += 2 * run) {
        const int64_t middle = begin + run < n ? begin + run : n;
        const int64_t end = begin + 2 * run < n ? begin + 2 * run : n;
        for (int64_t k = begin, a = begin, b = middle; k < end; ++k) {
          const bool first = b == end || (a < middle && keys[a] <= keys[b]);
          const int64_t from = first ? a++ : b++;
          spare[k] = keys[from], spare_perm[k] = perm[from];
        }
      }
      R* const k = keys;
      keys = spare, spare = k;
      int64_t* const p = perm;
      perm = spare_perm, spare_perm = p;
    }
  }

  // dx_i += sum over k of w_k (x_i - others_k)
  FL_NOINLINE void draw(int64_t i, const R* w, int64_t step, const R* others, int64_t count) const {
    constexpr int kBlock = 4;
    const R* const row = x_ + i * a_.d;
    R* const dx = static_cast<R*>(a_.dx) + i * a_.d;
    int64_t f = 0;
    for (; f + kBlock * W <= a_.d; f += kBlock * W) {
      F x[kBlock], sum[kBlock] = {};
      for (int v = 0; v < kBlock; ++v) x[v] = load(row + f + v * W);
      for (int64_t k = 0; k < count; ++k) {
        const R factor = w[k * step];
        if (factor == 0) continue;
        const R* const other = others + k * a_.d + f;
        for (int v = 0; v < kBlock; ++v) sum[v] += (x[v] - load(other + v * W)) * factor;
      }
      for (int v = 0; v < kBlock; ++v) store(dx + f + v * W, load(dx + f + v * W) + sum[v]);
    }
    for (; f < a_.d; f += W) {
      const int64_t left = a_.d - f;
      const auto get = [&](const R* p) { return left >= W ? load(p) : load_part(p, left, R(0)); };
      F sum{};
      for (int64_t k = 0; k < count; ++k)
        if (w[k * step] != 0) sum += (get(row + f) - get(others + k * a_.d + f)) * w[k * step];
      sum += get(dx + f);
      left >= W ? store(dx + f, sum) : store_part(dx + f, sum, left);
    }
  }

  const TripletArgs& a_;
  const R* x_;
};

template <class R>
void anchors(const TripletArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) Triplets<R>(a).anchor(r);
}
template <class R>
void draw_anchors(const TripletArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) Triplets<R>(a).draw_anchor(r);
}
template <class R>
void draw_others(const TripletArgs& a, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) Triplets<R>(a).draw_other(j);
}

void pack_rows(const TripletArgs& a, int64_t begin, int64_t end) {
  a.is_double ? Triplets<double>(a).pack(begin, end) : Triplets<float>(a).pack(begin, end);
}
void anchors_of(const TripletArgs& a, int64_t begin, int64_t end) {
  a.is_double ? anchors<double>(a, begin, end) : anchors<float>(a, begin, end);
}
void draw_anchors_of(const TripletArgs& a, int64_t begin, int64_t end) {
  a.is_double ? draw_anchors<double>(a, begin, end) : draw_anchors<float>(a, begin, end);
}
void draw_others_of(const TripletArgs& a, int64_t begin, int64_t end) {
  a.is_double ? draw_others<double>(a, begin, end) : draw_others<float>(a, begin, end);
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
FASTLOSS_OF_ISA(TripletKernels, triplet_kernels) = {&pack_rows, &anchors_of, &draw_anchors_of,
                                                    &draw_others_of};
}  // namespace fastloss::cpu
