// The passes over a block that replace each entry by its gradient.
#pragma once
#include "similarity_block.cuh"

namespace fastloss::cuda::similarity {

// softmax_prob, for a gradient that is rounded to G: a half-precision type needs no accurate exponential.
template <class G, class R>
__device__ __forceinline__ R prob(R s, R m, R log_sum) {
  if constexpr (std::is_same_v<G, R>) return softmax_prob(s, m, log_sum);
  return log_sum == R(-INFINITY) ? R(0) : exp((s - m) - log_sum);
}

// softmax_gradient and pairs_gradient
template <class R, class G, bool kIds>
__global__ void __launch_bounds__(kWarps * 32) gradient_kernel(TileChunk a, int band) {
  using T = Cut<R, 2>;
  constexpr int kColumns = T::kColumns;
  const Chunk<R> c(a);
  const int first = T::first(), left = static_cast<int>(a.cols) - first;
  const int64_t begin = int64_t{blockIdx.x} * band;
  const int count = a.rows - begin < band ? static_cast<int>(a.rows - begin) : band;
  FL_SHARED(R, row_max, kBand);
  FL_SHARED(R, row_log_sum, kBand);
  FL_SHARED(R, row_grad, kBand);
  FL_SHARED(R, row_positive, kBand);
  FL_SHARED(R, dots, kWarps * kBand);
  FL_SHARED(int, targets, kBand);
  FL_SHARED(int64_t, row_id, kBand);
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    const int64_t i = a.row + begin + r;
    row_max[r] = a.row_max ? c.at(a.row_max, i) : R(0);
    // -inf: probabilities are 0
    row_log_sum[r] = a.row_log_sum ? c.at(a.row_log_sum, i) : R(-INFINITY);
    row_grad[r] = a.row_grad ? c.at(a.row_grad, i) : R(0);
    row_positive[r] = a.positive_grad ? c.at(a.positive_grad, i) : R(0);
    targets[r] = c.target_col(begin + r);
    row_id[r] = kIds ? a.row_ids[i] : 0;
  }
  R col_max[kColumns], col_log_sum[kColumns], col_grad[kColumns];
  int64_t id[kIds ? kColumns : 1];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const bool there = T::offset(k) < left;
    const int64_t j = a.col + first + T::offset(k);
    if constexpr (kIds) id[k] = there ? a.col_ids[j] : 0;
    const bool columns = there && a.col_grad;
    col_max[k] = columns ? c.at(a.col_max, j) : R(0);
    col_log_sum[k] = columns ? c.at(a.col_log_sum, j) : R(-INFINITY);
    col_grad[k] = columns ? c.at(a.col_grad, j) : R(0);
  }
  __syncthreads();
  const auto positive_term = [&](R v, R up, R top, R log_sum) {
    R slope = -1;
    if (a.pass == TilePass::pairs_gradient) softplus((top - v) + log_sum, slope);
    return up * slope;
  };
  for (int r = 0; r < count; r += 2) {
    R v[2][kColumns];
#pragma unroll
    for (int q = 0; q < 2; ++q) T::load(c.row(begin + r + q) + first, left, r + q < count, v[q]);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int at = r + q;
      if (at >= count) continue;
      const int target = targets[at] - first;
      const int64_t id_of_row = row_id[at];
      const R top = row_max[at], log_sum = row_log_sum[at], up = row_grad[at];
      // First as if every entry was a negative, without a branch, so that the exponentials of several entries
      // overlap. Then the entries that are not: without ids a row has at most one.
      R g[kColumns];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const R x = c.value(v[q][k]);
        g[k] = up * prob<G>(x, top, log_sum) + col_grad[k] * prob<G>(x, col_max[k], col_log_sum[k]);
      }
      if (kIds || static_cast<unsigned>(target) <= static_cast<unsigned>(T::offset(kColumns - 1))) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const bool is_target = T::offset(k) == target, same = kIds && id[kIds ? k : 0] == id_of_row;
          if (!is_target && !same) continue;
          const Entry e = c.entry(is_target, same);
          if (!c.summed(e)) g[k] = 0;
          if (e != Entry::positive || !a.positive_grad) continue;
          const R x = c.value(v[q][k]);
          g[k] -= positive_term(x, row_positive[at], top, log_sum);
          const int64_t j = a.col + first + T::offset(k);
          if (a.col_positive_grad && T::offset(k) < left)
            g[k] -=
                positive_term(x, c.at(a.col_positive_grad, j), c.at(a.col_max, j), c.at(a.col_log_sum, j));
        }
      }
      R dot = 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (T::offset(k) < left) dot += g[k] * v[q][k];
        v[q][k] = g[k];
      }
      T::store(static_cast<G*>(a.g) + (begin + at) * a.g_pitch + first, left, v[q]);
      if (!a.dots) continue;
      dot = warp_sum(dot);
      if (threadIdx.x % 32 == 0) dots[threadIdx.x / 32 * kBand + at] = dot;
    }
  }
  if (!a.dots) return;
  __syncthreads();
  leave_sums(a, begin, count, 0, dots);
}

// part: of each span the rows' sums of losses, then those of slopes, then dots
template <class R, class G, bool kIds>
__global__ void __launch_bounds__(kWarps * 32) sigmoid_kernel(TileChunk a, int band) {
  using T = Cut<R, 2>;
  constexpr int kColumns = T::kColumns;
  const Chunk<R> c(a);
  const int first = T::first(), left = static_cast<int>(a.cols) - first, warp = threadIdx.x / 32;
  const int64_t begin = int64_t{blockIdx.x} * band;
  const int count = a.rows - begin < band ? static_cast<int>(a.rows - begin) : band;
  FL_SHARED(R, losses, kWarps * kBand);
  FL_SHARED(R, slopes, kWarps * kBand);
  FL_SHARED(R, dots, kWarps * kBand);
  int64_t id[kIds ? kColumns : 1];
  if constexpr (kIds) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k)
      id[k] = T::offset(k) < left ? a.col_ids[a.col + first + T::offset(k)] : 0;
  }
  for (int r = 0; r < count; r += 2) {
    R v[2][kColumns], loss[2] = {0, 0}, slope_sum[2] = {0, 0}, dot[2] = {0, 0};
#pragma unroll
    for (int q = 0; q < 2; ++q) T::load(c.row(begin + r + q) + first, left, r + q < count, v[q]);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const bool there = r + q < count;
      const int64_t i = a.row + begin + r + q;
      const int target = there ? c.target_col(begin + r + q) - first : -1;
      const int64_t id_of_row = kIds && there ? a.row_ids[i] : 0;
      const R up = there && a.row_grad ? c.at(a.row_grad, i) : R(0);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const Entry e = c.entry(T::offset(k) == target, kIds && id[kIds ? k : 0] == id_of_row);
        const R x = c.value(v[q][k]), sign = e == Entry::positive ? R(-1) : R(1);
        R slope = 0;
        if (e != Entry::left_out && T::offset(k) < left) {
          loss[q] += softplus(sign * x, slope);
          slope *= sign;
          slope_sum[q] += slope;
        }
        slope *= up;
        if (T::offset(k) < left) dot[q] += slope * v[q][k];
        v[q][k] = slope;
      }
      if (there && a.row_grad)
        T::store(static_cast<G*>(a.g) + (begin + r + q) * a.g_pitch + first, left, v[q]);
      loss[q] = warp_sum(loss[q]);
      slope_sum[q] = warp_sum(slope_sum[q]);
      if (a.dots) dot[q] = warp_sum(dot[q]);
      if (threadIdx.x % 32 == 0 && there) {
        losses[warp * kBand + r + q] = loss[q];
        slopes[warp * kBand + r + q] = slope_sum[q];
        dots[warp * kBand + r + q] = dot[q];
      }
    }
  }
  __syncthreads();
  leave_sums(a, begin, count, 0, losses);
  leave_sums(a, begin, count, 1, slopes);
  if (a.dots) leave_sums(a, begin, count, 2, dots);
}

}  // namespace fastloss::cuda::similarity
