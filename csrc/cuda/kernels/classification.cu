// Launchers of the row losses, and the small kernels around a reduction over rows.
#include "classification.cuh"

#include "../launch.cuh"
#include "../reduce.cuh"

namespace fastloss::cuda {
namespace {

// Sums over rows, in double and in an order that depends on their number alone: few rows are added by one
// block, more by several, whose partial sums in `a.partial` a second kernel adds.
constexpr int kSumThreads = 1024, kAtOnce = 8;  // kAtOnce loads of a thread are in flight together

// The sum over i in [begin, end) of value(load(i)), for all threads of the block. value(load(-1)) has to be
// 0. Loads are separate from values so that there is no branch between two loads.
template <class Load, class Value>
__device__ __forceinline__ double sum_of_range(int64_t begin, int64_t end, Load load, Value value) {
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kAtOnce * kSumThreads) {
    decltype(load(i)) loaded[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) loaded[u] = load(i + u * kSumThreads < end ? i + u * kSumThreads : -1);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) sum += value(loaded[u]);
  }
  return block_sum<kSumThreads>(sum);
}

// A row's terms of the norm, and of the result.
template <class R>
struct NormOfRow {
  struct Loaded {
    int64_t target;
    R weight;
  };
  static __device__ __forceinline__ Loaded load(const RowArgs& a, int64_t r) {
    Loaded row{-1, R(r >= 0)};
    if (a.target && r >= 0) row.target = a.target[r];
    if (a.row_weight && r >= 0) row.weight = static_cast<const R*>(a.row_weight)[r];
    return row;
  }
  static __device__ __forceinline__ double value(const RowArgs& a, const Loaded& row) {
    if (a.target && row.target == a.ignore_index) return 0;
    double w = row.weight;
    if (a.class_weight && !a.norm_counts_rows && row.target >= 0 && row.target < a.n)
      w *= double(static_cast<const R*>(a.class_weight)[row.target]);
    return w;
  }
  static __device__ __forceinline__ void write(const RowArgs&, void* out, double sum) {
    *static_cast<R*>(out) = static_cast<R>(sum);
  }
};
template <class R>
struct LossOfRow {
  static __device__ __forceinline__ R load(const RowArgs& a, int64_t r) {
    return r >= 0 ? static_cast<const R*>(a.loss)[r] : R(0);
  }
  static __device__ __forceinline__ double value(const RowArgs&, R loss) { return double(loss); }
  static __device__ __forceinline__ void write(const RowArgs& a, void* out, double sum) {
    const R result = static_cast<R>(a.norm ? sum / double(*static_cast<const R*>(a.norm)) : sum);
    if (!a.narrow_result) {
      *static_cast<R*>(out) = result;
    } else if (a.dtype == DType::bf16) {
      *static_cast<__nv_bfloat16*>(out) = narrow<__nv_bfloat16>(float(result));
    } else {
      *static_cast<__half*>(out) = narrow<__half>(float(result));
    }
  }
};
template <class Row>
__device__ __forceinline__ double sum_of_rows(const RowArgs& a, int64_t begin, int64_t end) {
  return sum_of_range(
      begin, end, [&](int64_t r) { return Row::load(a, r); }, [&](auto row) { return Row::value(a, row); });
}

// All rows, by one block.
template <class Row>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(RowArgs a, void* out) {
  const double sum = sum_of_rows<Row>(a, 0, a.rows);
  if (threadIdx.x == 0) Row::write(a, out, sum);
}
// Each block adds a part of the rows.
template <class Row>
__global__ void __launch_bounds__(kSumThreads) partial_kernel(RowArgs a) {
  const int64_t each = (a.rows + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * each, end = begin + each;
  const double sum = sum_of_rows<Row>(a, begin, end < a.rows ? end : a.rows);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}
template <class Row>
__global__ void __launch_bounds__(kSumThreads) total_kernel(RowArgs a, int64_t partials, void* out) {
  const double sum = sum_of_range(
      0, partials, [&](int64_t i) { return i >= 0 ? a.partial[i] : 0.0; }, [](double x) { return x; });
  if (threadIdx.x == 0) Row::write(a, out, sum);
}

template <class Row>
void sum_rows(const RowArgs& a, void* out, cudaStream_t stream) {
  if (!a.partial) return launch_1d<&sum_kernel<Row>>(1, kSumThreads, 0, stream, a, out);
  const int64_t wish = (a.rows + kSumThreads - 1) / kSumThreads;
  const int64_t partials = wish < kRowPartials ? wish : kRowPartials;
  launch_1d<&partial_kernel<Row>>(partials, kSumThreads, 0, stream, a);
  launch_1d<&total_kernel<Row>>(1, kSumThreads, 0, stream, a, partials, out);
}

}  // namespace

void row_norm(const RowArgs& a, void* norm, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::f64) return sum_rows<NormOfRow<double>>(a, norm, s);
  sum_rows<NormOfRow<float>>(a, norm, s);
}
void row_reduce(const RowArgs& a, void* out, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::f64) return sum_rows<LossOfRow<double>>(a, out, s);
  sum_rows<LossOfRow<float>>(a, out, s);
}
#define FASTLOSS_LAUNCH(name, Loss)                                                                  \
  void name(const RowArgs& a, void* stream) {                                                        \
    with_device_type(a.dtype,                                                                        \
                     [&]<class T> { RowLaunchers<T>::name(a, static_cast<cudaStream_t>(stream)); }); \
  }
FASTLOSS_ROW_KERNELS(FASTLOSS_LAUNCH)

}  // namespace fastloss::cuda
