// All triplets of a batch on the CPU, for one instruction set each.
#pragma once
#include "../../losses/triplets.h"
#include "../dispatch.h"

namespace fastloss::cpu {

inline constexpr int64_t kTripletRows =
    16;  // rows of x that are packed together; chunks' steps are multiples

struct TripletKernels {
  void (*pack)(const TripletArgs&, int64_t begin, int64_t end);          // groups of kTripletRows rows
  void (*anchors)(const TripletArgs&, int64_t begin, int64_t end);       // of the chunk
  void (*draw_anchors)(const TripletArgs&, int64_t begin, int64_t end);  // of the chunk
  void (*draw_others)(const TripletArgs&, int64_t begin, int64_t end);   // of all rows
};

FASTLOSS_PER_ISA(TripletKernels, triplet_kernels)

}  // namespace fastloss::cpu
