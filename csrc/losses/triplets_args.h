// What a kernel that goes through all triplets of a batch is told, on CPU and CUDA alike. Plain data: no
// torch.
//
// Anchor i has the sum over its positives p and negatives n of max(0, d_ip - d_in + margin), and the number
// of terms that are greater than 0. Distances of a chunk of anchors lie in memory; the fewer of an anchor's
// positives and negatives are sorted, and each of the others finds its place among them. Backwards the
// distances become weights w_ij, with which x_i and x_j are drawn to each other.
#pragma once
#include <cstdint>

namespace fastloss {

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
