// All triplets of a batch (losses/triplets.h): a block for each anchor, then a block for each row of dx.
// Integer counts use atomics; floating-point sums have a fixed order.
#include "../../losses/triplets.h"
#include "../launch.cuh"
#include "../launchers.h"
#include "../reduce.cuh"

namespace fastloss::cuda {
namespace {

constexpr int kTripletThreads = 128;

// d[j] = |x_i - x_j|, or its square: a warp for each pair.
template <class R>
__device__ __forceinline__ void measure(const TripletArgs& a, int64_t i, R* d) {
  const R *const x = static_cast<const R*>(a.x), *const anchor = x + i * a.d;
  const int lane = threadIdx.x % 32;
  for (int64_t j = threadIdx.x / 32; j < a.m; j += kTripletThreads / 32) {
    R sum = 0;
    for (int64_t k = lane; k < a.d; k += 32) {
      const R gap = anchor[k] - x[j * a.d + k];
      sum += gap * gap;
    }
    sum = warp_sum(sum);
    if (lane == 0) d[j] = a.root ? sqrt(sum) : sum;
  }
}

// Bitonic sort of n keys, a power of two; the padding, with index -1, goes last.
template <class R>
__device__ __forceinline__ void sort(R* keys, int32_t* perm, int64_t n) {
  for (int64_t size = 2; size <= n; size *= 2)
    for (int64_t apart = size / 2; apart; apart /= 2) {
      for (int64_t k = threadIdx.x; k < n / 2; k += kTripletThreads) {
        const int64_t low = 2 * apart * (k / apart) + k % apart, high = low + apart;
        const R x = keys[low], y = keys[high];
        const int32_t p = perm[low], q = perm[high];
        const bool rising = (low & size) == 0;
        const bool more = x > y || (x == y && p < 0 && q >= 0), less = y > x || (x == y && q < 0 && p >= 0);
        if (rising ? more : less) keys[low] = y, keys[high] = x, perm[low] = q, perm[high] = p;
      }
      __syncthreads();
    }
}

// Terms of an anchor's sum that are greater than 0.
struct Terms {
  double sum = 0, number = 0;
  __device__ __forceinline__ void merge(const Terms& o) {
    sum += o.sum;
    number += o.number;
  }
};

template <class R>
__global__ void __launch_bounds__(kTripletThreads) anchors_kernel(TripletArgs a) {
  const int64_t r = blockIdx.x, i = a.row + r;
  R* const d = static_cast<R*>(a.distance) + r * a.ld;
  FL_SHARED(int, counters, 2);
  if (threadIdx.x < 2) counters[threadIdx.x] = 0;
  measure(a, i, d);
  __syncthreads();
  int mine = 0;
  for (int64_t j = threadIdx.x; j < a.m; j += kTripletThreads) mine += j != i && a.ids[j] == a.ids[i];
  atomicAdd(&counters[0], mine);
  __syncthreads();
  const int64_t positives = counters[0], negatives = a.m - 1 - positives;
  const bool few_positives = positives <= negatives;
  const int64_t few = few_positives ? positives : negatives, many = a.m - 1 - few;
  Terms terms;
  if (few > 0) {
    R* const keys = static_cast<R*>(a.sorted_dist) + r * a.capacity;
    int32_t *const perm = a.perm + r * (2 * a.capacity + 1), *const counts = perm + a.capacity;
    const R margin = static_cast<R>(a.margin), up = a.sums ? R(0) : static_cast<const R*>(a.grad)[i];
    const auto key = [&](int64_t j, bool positive) {
      return positive ? positive_key(d[j], margin) : negative_key(d[j]);
    };
    const auto counted = [&](int64_t j, bool positive, int64_t times) {
      if (times && positive)
        terms.sum += double(times) * (double(d[j]) + a.margin), terms.number += double(times);
      if (times && !positive) terms.sum -= double(times) * double(d[j]);
      if (!a.sums) d[j] = times ? triplet_weight(d[j], (positive ? up : -up) * R(times), a.root) : R(0);
    };
    int64_t size = 1;
    while (size < few) size *= 2;
    for (int64_t j = threadIdx.x; j < a.m; j += kTripletThreads) {
      if (j == i || (a.ids[j] == a.ids[i]) != few_positives) continue;
      const int slot = atomicAdd(&counters[1], 1);
      keys[slot] = key(j, few_positives);
      perm[slot] = static_cast<int32_t>(j);
    }
    for (int64_t k = few + threadIdx.x; k < size; k += kTripletThreads) keys[k] = INFINITY, perm[k] = -1;
    for (int64_t k = threadIdx.x; k <= few; k += kTripletThreads) counts[k] = 0;
    __syncthreads();
    sort(keys, perm, size);
    for (int64_t j = threadIdx.x; j < a.m; j += kTripletThreads) {
      if (j == i || (a.ids[j] == a.ids[i]) == few_positives) continue;
      const int64_t below = count_below(keys, few, key(j, !few_positives), few_positives);
      atomicAdd(&counts[below], 1);
      counted(j, !few_positives, few_positives ? few - below : below);
    }
    __syncthreads();
    // a prefix sum of counts: for each member of the smaller group, how many of the larger come before it
    FL_SHARED(int, part, kTripletThreads);
    const int64_t each = (few + kTripletThreads - 1) / kTripletThreads, begin = threadIdx.x * each;
    const int64_t end = begin + each < few ? begin + each : few;
    int count = 0;
    for (int64_t k = begin; k < end; ++k) count += counts[k];
    part[threadIdx.x] = count;
    __syncthreads();
    int64_t before = 0;
    for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) before += part[t];
    for (int64_t k = begin; k < end; ++k) {
      before += counts[k];
      counted(perm[k], few_positives, few_positives ? before : many - before);
    }
  } else if (!a.sums) {
    for (int64_t j = threadIdx.x; j < a.m; j += kTripletThreads) d[j] = 0;
  }
  if (!a.sums) {
    if (few > 0 && threadIdx.x == 0) d[i] = 0;
    return;
  }
  terms = block_merge_tree<kTripletThreads>(terms);
  if (threadIdx.x == 0) {
    static_cast<R*>(a.sums)[i] = static_cast<R>(terms.sum);
    static_cast<R*>(a.sums)[a.m + i] = static_cast<R>(terms.number);
  }
}

// dx_i += sum over j of w_ij (x_i - x_j): i an anchor of the chunk, or (kOthers) any row, j then an anchor.
template <class R, bool kOthers>
__global__ void __launch_bounds__(kTripletThreads) draw_kernel(TripletArgs a) {
  const R *const x = static_cast<const R*>(a.x), *const w = static_cast<const R*>(a.distance);
  const int64_t i = kOthers ? blockIdx.x : a.row + blockIdx.x, count = kOthers ? a.rows : a.m;
  for (int64_t f = threadIdx.x; f < a.d; f += kTripletThreads) {
    const R x_if = x[i * a.d + f];
    R sum = 0;
    for (int64_t k = 0; k < count; ++k) {
      const R factor = kOthers ? w[k * a.ld + i] : w[blockIdx.x * a.ld + k];
      if (factor != 0) sum += factor * (x_if - x[(kOthers ? a.row + k : k) * a.d + f]);
    }
    static_cast<R*>(a.dx)[i * a.d + f] += sum;
  }
}

template <class R>
void run(const TripletArgs& a, cudaStream_t stream) {
  launch_1d<&anchors_kernel<R>>(a.rows, kTripletThreads, 0, stream, a);
  if (a.sums) return;
  launch_1d<&draw_kernel<R, false>>(a.rows, kTripletThreads, 0, stream, a);
  launch_1d<&draw_kernel<R, true>>(a.m, kTripletThreads, 0, stream, a);
}

}  // namespace

void triplets(const TripletArgs& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  a.is_double ? run<double>(a, s) : run<float>(a, s);
}

}  // namespace fastloss::cuda
