// What the stand-alone programs cuda_*_variants.cu share: cross-entropy of bfloat16 logits as a thread computes it, a
// vector of 16 bytes at a time, and the sums of a team. Not the project's kernels, which compute more.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
namespace cg = cooperative_groups;
constexpr float kLog2e = 1.4426950408889634f;
#define D __device__ __forceinline__
D float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
D void unpack(uint4 q, float* z) {
  const unsigned w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    z[2 * i] = __uint_as_float(w[i] << 16);
    z[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}
D unsigned pack2(float a, float b) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
template <int kHint>
D uint4 ld(const uint4* p) {
  uint4 v;
  if (kHint == 0)
    v = *p;
  else if (kHint == 1)
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
  else
    v = __ldcs(p);
  return v;
}
template <int kHint>
D void st(uint4* p, uint4 v) {
  if (kHint == 0)
    *p = v;
  else
    __stcs(p, v);
}

struct State {
  float m = -INFINITY, s = 0;
};
D void addv(State& o, uint4 q, int hit) {
  float z[8];
  unpack(q, z);
  float top = fmaxf(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])), fmaxf(fmaxf(z[4], z[5]), fmaxf(z[6], z[7])));
  if (top > o.m) {
    o.s *= o.m == -INFINITY ? 0.f : ex2((o.m - top) * kLog2e);
    o.m = top;
  }
  const float b = o.m;
  if (static_cast<unsigned>(hit) < 8u) {
#pragma unroll
    for (int k = 0; k < 8; ++k) o.s += k == hit ? 0.f : ex2((z[k] - b) * kLog2e);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) o.s += ex2((z[k] - b) * kLog2e);
  }
}
D uint4 gradv(uint4 q, float m, float L, float coef, float ct, int hit) {
  float z[8];
  unpack(q, z);
#pragma unroll
  for (int k = 0; k < 8; ++k) z[k] = coef * ex2(fmaf(z[k] - m, kLog2e, -L));
  if (static_cast<unsigned>(hit) < 8u) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (k == hit) z[k] = ct;
  }
  return make_uint4(pack2(z[0], z[1]), pack2(z[2], z[3]), pack2(z[4], z[5]), pack2(z[6], z[7]));
}
template <int kTeam>
D State team(State o, float* sm) {
  float top = o.m;
#pragma unroll
  for (int f = 16; f; f /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, f));
  constexpr int W = kTeam / 32;
  if (W > 1) {
    if (threadIdx.x % 32 == 0) sm[threadIdx.x / 32] = top;
    __syncthreads();
    top = sm[threadIdx.x % W];
#pragma unroll
    for (int f = W / 2; f; f /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, f));
  }
  float s = o.s * (o.m == -INFINITY ? 0.f : ex2((o.m - top) * kLog2e));
#pragma unroll
  for (int f = 16; f; f /= 2) s += __shfl_xor_sync(~0u, s, f);
  if (W > 1) {
    if (threadIdx.x % 32 == 0) sm[32 + threadIdx.x / 32] = s;
    __syncthreads();
    s = sm[32 + threadIdx.x % W];
#pragma unroll
    for (int f = W / 2; f; f /= 2) s += __shfl_xor_sync(~0u, s, f);
  }
  return {top, s};
}
struct Args {
  const uint4* x;
  uint4* dx;
  const int64_t* t;
  float* loss;
  int64_t rows;
  int n;
  int slots;
  float g;
  const float* norm = nullptr;  // divides g, if it is there
};

D void finish(const Args& a, int64_t r, State o, float xt, float& L, float& coef, float& ct, bool leader) {
  const float e = ex2((xt - o.m) * kLog2e), sum = o.s + e, ls = logf(sum);
  L = ls * kLog2e;
  coef = a.g;
  ct = -a.g * (o.s / sum);
  if (leader) a.loss[r] = ls - (xt - o.m);
}

// Normally distributed logits.
__global__ void init(__nv_bfloat16* x, int64_t n) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t h = i * 0x9E3779B97F4A7C15ull;
    h ^= h >> 29;
    h *= 0xBF58476D1CE4E5B9ull;
    h ^= h >> 32;
    h *= 0x94D049BB133111EBull;
    h ^= h >> 29;
    const float u = ((h & 0xffffff) + 0.5f) / 16777216.f, w = ((h >> 24 & 0xffffff) + 0.5f) / 16777216.f;
    x[i] = __float2bfloat16(sqrtf(-2 * logf(u)) * cospif(2 * w));
  }
}

#define OK(e)                                        \
  do {                                               \
    cudaError_t q = (e);                             \
    if (q != cudaSuccess) {                          \
      printf("  ERROR %s\n", cudaGetErrorString(q)); \
      cudaGetLastError();                            \
    }                                                \
  } while (0)
