// What kernels may use of CUDA, each against what it must give: `features` prints the first difference.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "cluster.cuh"

namespace {

using fastloss::cuda::launch;
using fastloss::cuda::launch_clusters;
constexpr unsigned kFull = 0xffffffffu;

[[noreturn]] void wrong(const std::string& what, double got, double expected) {
  throw std::runtime_error(what + ": got " + std::to_string(got) + ", expected " + std::to_string(expected));
}
void expect(const char* what, double got, double expected, double tolerance = 0) {
  if (!(std::abs(got - expected) <= tolerance * std::max(1., std::abs(expected)))) wrong(what, got, expected);
}

// ---- collectives of every type that is shuffled

template <class T>
__global__ void shuffles(T* y) {
  const int t = threadIdx.x, warps = 4;
  const T v = static_cast<T>(t);
  y[t] = __shfl_sync(kFull, v, 3);
  y[t + 32 * warps] = __shfl_up_sync(kFull, v, 1u, 8);
  y[t + 64 * warps] = __shfl_down_sync(kFull, v, 2u, 16);
  y[t + 96 * warps] = __shfl_xor_sync(kFull, v, 5);
}
template <class T>
void test_shuffles(const char* type) {
  std::vector<T> y(512);
  launch(&shuffles<T>, dim3(1), dim3(128), 0, nullptr, y.data());
  for (int t = 0; t < 128; ++t) {
    expect(type, static_cast<double>(y[t]), t / 32 * 32 + 3);
    expect(type, static_cast<double>(y[t + 128]), t % 8 ? t - 1 : t);
    expect(type, static_cast<double>(y[t + 256]), t % 16 < 14 ? t + 2 : t);
    expect(type, static_cast<double>(y[t + 384]), t ^ 5);
  }
}

__global__ void votes(unsigned* y) {
  const int t = threadIdx.x, lane = t % 32;
  y[t * 8 + 0] = __ballot_sync(kFull, lane % 2);
  y[t * 8 + 1] =
      __any_sync(kFull, lane == 7) + 2 * __all_sync(kFull, lane < 32) + 4 * __any_sync(kFull, lane > 40);
  y[t * 8 + 2] = __match_any_sync(kFull, static_cast<unsigned>(lane / 8));
  y[t * 8 + 3] = __reduce_add_sync(kFull, lane) + __reduce_max_sync(kFull, 5u * lane);
  y[t * 8 + 4] = __reduce_min_sync(kFull, lane - 40) + __reduce_xor_sync(kFull, 1u << lane);
  y[t * 8 + 5] = __syncthreads_count(t < 40);
  y[t * 8 + 6] = __syncthreads_or(t == 63) + 2 * __syncthreads_and(t < 63);
  unsigned halves = t % 32 < 16 ? 0xffffu : 0xffff0000u, sum = lane;
  for (int d = 8; d; d /= 2) sum += __shfl_xor_sync(halves, sum, d, 16);
  y[t * 8 + 7] = sum;
}
void test_votes() {
  std::vector<unsigned> y(64 * 8);
  launch(&votes, dim3(1), dim3(64), 0, nullptr, y.data());
  for (int t = 0; t < 64; ++t) {
    const unsigned expected[8] = {0xaaaaaaaau, 3, 0xffu << t % 32 / 8 * 8,  496 + 155, -40u + kFull,
                                  40,          1, t % 32 < 16 ? 120u : 376u};
    for (int k = 0; k < 8; ++k) expect("votes", y[t * 8 + k], expected[k]);
  }
}

// ---- memory

__global__ void vectors(const float4* x, float4* y, const uint4* bits, uint4* copy) {
  const int t = threadIdx.x;
  const float4 a = __ldg(x + t), b = __ldcs(x + t);
  __stcs(y + t, make_float4(a.x + b.w, a.y, a.z, a.w));
  __stcs(copy + t, __ldg(bits + t));
}
void test_vectors() {
  std::vector<float4> x(32), y(32);
  std::vector<uint4> bits(32), copy(32);
  for (unsigned i = 0; i < 32; ++i)
    x[i] = {1.f * i, 2.f * i, 3.f * i, 4.f * i}, bits[i] = {i, i + 1, i + 2, ~i};
  launch(&vectors, dim3(1), dim3(32), 0, nullptr, x.data(), y.data(), bits.data(), copy.data());
  for (unsigned i = 0; i < 32; ++i) {
    expect("float4", y[i].x, 5. * i);
    expect("uint4", copy[i].w, ~i);
  }
}

__global__ void atomics(unsigned* u, int* i, unsigned long long* l, float* f) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&u[0], 2u);
  atomicMax(&u[1], static_cast<unsigned>(t));
  atomicInc(&u[2], 99u);
  atomicAdd(&i[0], -t);
  atomicMin(&i[1], -t);
  atomicAdd(l, 1ull << 33);
  atomicAdd(f, .5f);
}
void test_atomics() {
  std::vector<unsigned> u(3);
  std::vector<int> i(2);
  unsigned long long l = 0;
  float f = 0;
  launch(&atomics, dim3(4), dim3(32), 0, nullptr, u.data(), i.data(), &l, &f);
  expect("atomicAdd of unsigned", u[0], 256);
  expect("atomicMax", u[1], 127);
  expect("atomicInc", u[2], 28);
  expect("atomicAdd of int", i[0], -8128);
  expect("atomicMin", i[1], -127);
  expect("atomicAdd of unsigned long long", static_cast<double>(l), 128. * (1ull << 33));
  expect("atomicAdd of float", f, 64);
}

// Two batches under way: the first is used while the second is still being copied.
__global__ void pipeline(const float4* x, float* y) {
  FL_SHARED(float4, tile, 128);
  const int t = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    __pipeline_memcpy_async(&tile[stage * 64 + t], &x[stage * 64 + t], 16, stage && t == 9 ? 8 : 0);
    __pipeline_commit();
  }
  float sum = 0;
  for (int stage = 0; stage < 2; ++stage) {
    __pipeline_wait_prior(1 - stage);
    __syncthreads();
    const float4 v = tile[stage * 64 + (t ^ 1)];
    sum += v.x + v.w;
  }
  y[t] = sum;
}
void test_pipeline() {
  std::vector<float4> x(128);
  std::vector<float> y(64);
  for (int i = 0; i < 128; ++i) x[i] = {1.f * i, 0, 0, 1};
  launch(&pipeline, dim3(1), dim3(64), 0, nullptr, x.data(), y.data());
  for (int t = 0; t < 64; ++t) expect("cp.async", y[t], 2 * (t ^ 1) + 64 + (t == 8 ? 1 : 2));
}

// ---- clusters

// A block writes into the memory of all, static and dynamic, one turn after the other in alternating places, and
// then adds what the others wrote.
__global__ void clusters(int* y) {
  using fastloss::cuda::cluster_rank, fastloss::cuda::cluster_size, fastloss::cuda::cluster_sync,
      fastloss::cuda::peer_shared;
  FL_SHARED(int, got, 2 * 4 * 64);
  FL_DYN_SHARED(int, more);
  const int t = threadIdx.x, rank = cluster_rank(), size = cluster_size();
  int sum = 0;
  cluster_sync();
  for (int turn = 0; turn < 3; ++turn) {
    const int place = turn % 2 * 256 + rank * 64 + t, value = 1000 * blockIdx.x + t + turn;
    for (int to = 0; to < size; ++to) {
      *peer_shared(got + place, to) = value;
      *peer_shared(more + place, to) = -value;
    }
    cluster_sync();
    for (int from = 0; from < size; ++from)
      sum += 2 * got[turn % 2 * 256 + from * 64 + (t ^ 33)] + more[turn % 2 * 256 + from * 64 + t];
    __syncthreads();  // of one block while the other may be elsewhere
  }
  y[blockIdx.x * 64 + t] = sum;
}
void test_clusters(int size) {
  const int blocks = 3 * size;
  std::vector<int> y(blocks * 64);
  launch_clusters(&clusters, dim3(blocks), dim3(64), 2048, nullptr, size, y.data());
  for (int i = 0; i < blocks * 64; ++i) {
    const int t = i % 64, first = i / 64 / size * size;
    int sum = 0;
    for (int turn = 0; turn < 3; ++turn)
      for (int from = first; from < first + size; ++from)
        sum += 2 * (1000 * from + (t ^ 33) + turn) - (1000 * from + t + turn);
    expect("cluster", y[i], sum);
  }
}

// ---- arithmetic

__global__ void conversions(const float* x, float* y) {
  const float v = x[threadIdx.x];
  float* out = y + threadIdx.x * 6;
  out[0] = __half2float(__float2half_rn(v));
  out[1] = __bfloat162float(__float2bfloat16_rn(v));
  const float2 h = __half22float2(__floats2half2_rn(v, -v));
  const float2 b = __bfloat1622float2(__floats2bfloat162_rn(v, -v));
  out[2] = h.y;
  out[3] = b.y;
  out[4] = static_cast<float>(static_cast<__half>(v));
  out[5] = __uint_as_float(__float_as_uint(v));
}
void test_conversions() {
  std::vector<float> x(32), y(32 * 6);
  for (int i = 0; i < 32; ++i) x[i] = 1.f + static_cast<float>(i) / 1024;  // exact in half, not in bfloat16
  launch(&conversions, dim3(1), dim3(32), 0, nullptr, x.data(), y.data());
  for (int i = 0; i < 32; ++i) {
    const float near = std::nearbyint(x[i] * 128) / 128;  // 7 bits of bfloat16, halfway cases to even
    const float expected[6] = {x[i], near, -x[i], -near, x[i], x[i]};
    for (int k = 0; k < 6; ++k) expect("conversion", y[i * 6 + k], expected[k]);
  }
}

__global__ void arithmetic(const float* x, double* y) {
  const float v = x[threadIdx.x];
  double* out = y + threadIdx.x * 12;
  out[0] = __expf(v);
  out[1] = __logf(v);
  out[2] = exp2f(v);
  out[3] = tanhf(v);
  out[4] = __fdividef(v, 3.f);
  out[5] = rsqrtf(v);
  out[6] = log1pf(v);
  out[7] = fmaxf(v, NAN);
  out[8] = exp(static_cast<double>(v));
  out[9] = max(v, -1.f) + min(3, 5ll);
  out[10] = __fmaf_rn(v, v, 1.f);
  out[11] = erff(v);
}
void test_arithmetic() {
  std::vector<float> x(32);
  std::vector<double> y(32 * 12);
  for (int i = 0; i < 32; ++i) x[i] = .07f * (i + 1);
  launch(&arithmetic, dim3(1), dim3(32), 0, nullptr, x.data(), y.data());
  for (int i = 0; i < 32; ++i) {
    const double v = x[i], expected[12] = {std::exp(v),   std::log(v), std::exp2(v),
                                           std::tanh(v),  v / 3,       1 / std::sqrt(v),
                                           std::log1p(v), v,           std::exp(v),
                                           v + 3,         v * v + 1,   std::erf(v)};
    for (int k = 0; k < 12; ++k) expect("arithmetic", y[i * 12 + k], expected[k], 3e-7);
  }
}

// ---- the grid, and launches

__global__ void geometry(int* y) {
  const dim3 b = blockDim, g = gridDim;
  const int block = (blockIdx.z * g.y + blockIdx.y) * g.x + blockIdx.x;
  const int thread = (threadIdx.z * b.y + threadIdx.y) * b.x + threadIdx.x;
  y[block * b.x * b.y * b.z + thread] = block * 1000 + thread;
}
void test_geometry() {
  std::vector<int> y(24 * 64);
  launch(&geometry, dim3(4, 3, 2), dim3(8, 4, 2), 0, nullptr, y.data());
  for (int i = 0; i < 24 * 64; ++i) expect("geometry", y[i], i / 64 * 1000 + i % 64);
}

void expect_error(const char* what, dim3 grid, dim3 block, size_t smem, int cluster = 1) {
  int sink[64];
  try {
    launch_clusters(&geometry, grid, block, smem, nullptr, cluster, sink);
  } catch (const std::runtime_error&) {
    return;
  }
  throw std::runtime_error(std::string(what) + " was accepted");
}
void test_limits() {
  expect_error("a block of 2048 threads", dim3(1), dim3(2048), 0);
  expect_error("an empty grid", dim3(0), dim3(32), 0);
  expect_error("228 KiB of shared memory", dim3(1), dim3(32), 228 << 10);
  expect_error("a grid of 3 blocks in clusters of 2", dim3(3), dim3(32), 0, 2);
  expect_error("clusters of 16 blocks", dim3(16), dim3(2), 0, 16);
}

// Launches from several host threads, one of which fails over and over.
void test_host_threads() {
  std::vector<std::thread> threads;
  std::vector<std::string> errors(4);
  for (int k = 0; k < 4; ++k)
    threads.emplace_back([k, &errors] {
      try {
        for (int i = 0; i < 25; ++i) k == 3 ? test_limits() : k == 2 ? test_clusters(2) : test_votes();
      } catch (const std::exception& e) {
        errors[k] = e.what();
      }
    });
  for (std::thread& t : threads) t.join();
  for (const std::string& error : errors)
    if (!error.empty()) throw std::runtime_error("on several host threads: " + error);
}

}  // namespace

int main() {
  try {
    test_shuffles<float>("shuffle of float");
    test_shuffles<double>("shuffle of double");
    test_shuffles<int64_t>("shuffle of int64_t");
    test_shuffles<unsigned>("shuffle of unsigned");
    test_votes();
    test_vectors();
    test_atomics();
    test_pipeline();
    for (int size : {2, 4}) test_clusters(size);
    test_conversions();
    test_arithmetic();
    test_geometry();
    test_limits();
    test_host_threads();
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  std::puts("passed");
  return 0;
}
