// Triplet losses over all triplets of a batch. A triplet counts if positive_key(d_ip) > negative_key(d_in); a
// NaN distance counts in all of its triplets, so that it reaches the result.
#pragma once
#include <cstdint>

#include "../math/math.h"

namespace fastloss {

// The arguments of the kernels, on CPU and CUDA alike. Plain data: no torch.
//
// The results for anchor i are the sum over its positives p and negatives n of max(0, d_ip - d_in + margin),
// and the number of terms greater than 0. No array of m^3 triplets exists, and of the m^2 distances only
// those of a chunk of anchors are stored. Of an anchor's positives and negatives the smaller group is
// sorted; each member of the larger finds its place by binary search. In the backward pass weights w_ij
// replace the distances, and dx_i += sum_j w_ij (x_i - x_j), and the same for x_j.
struct TripletArgs {
  bool is_double;  // float64, else float32: of all arrays
  bool root;       // distances are |x_i - x_j|, else their squares
  int64_t m, d;    // [m, d]
  double margin;
  const void* x;
  const int64_t* ids;  // [m]: positives have the anchor's
  void* sums;          // forward: [2, m], sums and numbers of terms; backward: null
  const void* grad;    // backward: [m], of the sums
  void* dx;            // backward: [m, d], accumulated over chunks

  int64_t row, rows, ld;  // anchors of the chunk; leading dimension of `distance`
  void* distance;         // [rows, ld]
  void* panels;           // CPU: x, packed in vectors of rows
  int64_t capacity;       // CUDA, of the sort: a power of two, at least m / 2
  void* sorted_dist;      // [rows, capacity]: sort keys of the smaller group
  int32_t* perm;          // [rows, 2 * capacity + 1]: their permutation, then counts
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
