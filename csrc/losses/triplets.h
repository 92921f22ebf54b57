// Which triplets count: those with positive_key(d_ip) > negative_key(d_in). A distance that is NaN counts in
// all of its triplets, so that it is not lost.
#pragma once
#include <cstdint>

#include "../math/math.h"

namespace fastloss {

// What a kernel that goes through all triplets of a batch is told, on CPU and CUDA alike.
// Plain data: no torch.
//
// Anchor i has the sum over its positives p and negatives n of max(0, d_ip - d_in + margin), and the number
// of terms that are greater than 0. Distances of a chunk of anchors lie in memory; the fewer of an anchor's
// positives and negatives are sorted, and each of the others finds its place among them. Backwards the
// distances become weights w_ij, with which x_i and x_j are drawn to each other.
struct TripletArgs {
  bool wide;     // float64, else float32
  bool root;     // distances are |x_i - x_j|, else their squares
  int64_t m, d;  // [m, d]
  double margin;
  const void* x;
  const int64_t* ids;  // [m]: positives have the anchor's
  void* sums;          // [2, m]: sum and number; or null: backwards
  const void* grad;    // [m], of the sums
  void* dx;            // [m, d], added to

  int64_t row, rows, step;  // anchors of the chunk; from one row of distances to the next
  void* distance;           // [rows, step]
  void* panels;             // CPU: x, packed in vectors of rows
  int64_t room;             // CUDA: a power of two, no less than m / 2
  void* keys;               // [rows, room]
  int32_t* places;          // [rows, 2 * room + 1]
};

}  // namespace fastloss

namespace fastloss::inline FL_ISA {

template <class R>
FL_FN R positive_key(R d, R margin) {
  return d == d ? d + margin : R(INFINITY);
}
template <class R>
FL_FN R negative_key(R d) {
  return d == d ? d : R(-INFINITY);
}

// How many of n sorted keys are less than `key`, or at most `key`.
template <class R>
FL_FN int64_t count_below(const R* keys, int64_t n, R key, bool at_most) {
  int64_t begin = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    const R middle = keys[begin + half];
    const bool below = at_most ? middle <= key : middle < key;
    begin = below ? begin + half + 1 : begin;
    n = below ? n - half - 1 : half;
  }
  return begin;
}

// The factor of x_i - x_j in the gradient, from that of its distance; 0 where two rows are equal.
template <class R>
FL_FN R triplet_weight(R d, R up, bool root) {
  if (!root) return 2 * up;
  return d == 0 ? R(0) : up / d;
}

}  // namespace fastloss::inline FL_ISA
