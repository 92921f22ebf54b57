// Ways for a kernel of rows to keep a row between its two sweeps, held against each other: cross-entropy of
// bfloat16 logits, forward and gradient, rows aligned. Standalone, to find out what a GPU likes before the row
// driver (csrc/cuda/kernels/rows.cuh) is changed; what it found is in NOTES.md.
//
//   nvcc -O3 -std=c++20 -arch=sm_90 cuda_row_variants.cu -o cuda_row_variants && ./cuda_row_variants
//
// v0  a block a row; its beginning stays in shared memory, the rest is read again from L2
// v2  blocks that stay: while a row is written, the next one is copied into the shared memory that is free
// v3  a cluster of blocks a row, each of which keeps its part
// v4  the row in registers
// v5  clusters that stay: v2 and v3 together
#include "cuda_variants.cuh"

// V0: one row a block; first slots in shared memory, the rest read again
template <int kTeam, int kBlocks, int kLd, int kSt, int F>
__global__ void __launch_bounds__(kTeam, kBlocks) v0(Args a) {
  extern __shared__ uint4 cache[];
  __shared__ float sm[64];
  const int64_t r = blockIdx.x;
  const int nv = a.n / 8, lane = threadIdx.x;
  const uint4* x = a.x + r * nv;
  uint4* dx = a.dx + r * nv;
  const int t = (int)a.t[r];
  const float xt = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(x)[t]);
  State o;
  int j = lane;
  for (; j + (F - 1) * kTeam < nv; j += F * kTeam) {
    uint4 v[F];
#pragma unroll
    for (int u = 0; u < F; ++u) v[u] = ld<kLd>(x + j + u * kTeam);
#pragma unroll
    for (int u = 0; u < F; ++u) {
      const int i = j + u * kTeam;
      if (i < a.slots) cache[i] = v[u];
      addv(o, v[u], t - 8 * i);
    }
  }
  for (; j < nv; j += kTeam) {
    const uint4 v = ld<kLd>(x + j);
    if (j < a.slots) cache[j] = v;
    addv(o, v, t - 8 * j);
  }
  o = team<kTeam>(o, sm);
  float L, c, ct;
  finish(a, r, o, xt, L, c, ct, lane == 0);
  for (j = lane; j < a.slots && j < nv; j += kTeam)
    st<kSt>(dx + j, gradv(cache[j], o.m, L, c, ct, t - 8 * j));
  for (; j + (F - 1) * kTeam < nv; j += F * kTeam) {
    uint4 v[F];
#pragma unroll
    for (int u = 0; u < F; ++u) v[u] = ld<kLd>(x + j + u * kTeam);
#pragma unroll
    for (int u = 0; u < F; ++u)
      st<kSt>(dx + j + u * kTeam, gradv(v[u], o.m, L, c, ct, t - 8 * (j + u * kTeam)));
  }
  for (; j < nv; j += kTeam) st<kSt>(dx + j, gradv(ld<kLd>(x + j), o.m, L, c, ct, t - 8 * j));
}

D void cpa(uint4* s, const uint4* g) {
  unsigned a = (unsigned)__cvta_generic_to_shared(s);
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(a), "l"(g));
}
// V2: persistent; while a row is written, the next one is copied into the slots that are free. R vectors a
// thread stay in registers.
template <int kTeam, int kBlocks, int R, int kSt>
__global__ void __launch_bounds__(kTeam, kBlocks) v2(Args a) {
  extern __shared__ uint4 cache[];
  __shared__ float sm[64];
  const int nv = a.n / 8, lane = threadIdx.x, ns = a.slots;
  int64_t r = blockIdx.x;
  if (r >= a.rows) return;
  for (int j = lane; j < ns && j < nv; j += kTeam) cpa(cache + j, a.x + r * nv + j);
  asm volatile("cp.async.commit_group;");
  for (; r < a.rows; r += gridDim.x) {
    const uint4* x = a.x + r * nv;
    uint4* dx = a.dx + r * nv;
    const int t = (int)a.t[r];
    const float xt = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(x)[t]);
    const int64_t next = r + gridDim.x;
    const uint4* nx = a.x + next * nv;
    const bool more = next < a.rows;
    uint4 v[R];
    const int first = ns + lane;
#pragma unroll
    for (int u = 0; u < R; ++u)
      if (first + u * kTeam < nv) v[u] = ld<1>(x + first + u * kTeam);
    asm volatile("cp.async.wait_all;" ::: "memory");
    State o;
    for (int j = lane; j < ns && j < nv; j += kTeam) addv(o, cache[j], t - 8 * j);
#pragma unroll
    for (int u = 0; u < R; ++u)
      if (first + u * kTeam < nv) addv(o, v[u], t - 8 * (first + u * kTeam));
    o = team<kTeam>(o, sm);
    float L, c, ct;
    finish(a, r, o, xt, L, c, ct, lane == 0);
    for (int j = lane; j < ns && j < nv; j += kTeam) {
      const uint4 q = cache[j];
      if (more) cpa(cache + j, nx + j);
      st<kSt>(dx + j, gradv(q, o.m, L, c, ct, t - 8 * j));
    }
    asm volatile("cp.async.commit_group;");
#pragma unroll
    for (int u = 0; u < R; ++u)
      if (first + u * kTeam < nv)
        st<kSt>(dx + first + u * kTeam, gradv(v[u], o.m, L, c, ct, t - 8 * (first + u * kTeam)));
    __syncthreads();  // sm is used again
  }
}

// V3: a cluster of C blocks a row, each keeps its part in shared memory and R vectors a thread in registers
template <int kTeam, int kBlocks, int R, int C, int kSt, int F>
__global__ void __launch_bounds__(kTeam, kBlocks) v3(Args a) {
  extern __shared__ uint4 cache[];
  __shared__ float sm[64];
  __shared__ float2 whole;
  cg::cluster_group cl = cg::this_cluster();
  const int64_t r = blockIdx.x / C;
  const int rank = cl.block_rank();
  const int all = a.n / 8, per = (all + C - 1) / C, begin = rank * per, nv = min(per, all - begin),
            lane = threadIdx.x, ns = a.slots;
  const uint4* x = a.x + r * all + begin;
  uint4* dx = a.dx + r * all + begin;
  const int t = (int)a.t[r], th = t - 8 * begin;
  const float xt = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(a.x + r * all)[t]);
  State o;
  int j = lane;
  for (; j + (F - 1) * kTeam < ns && j + (F - 1) * kTeam < nv; j += F * kTeam) {
    uint4 v[F];
#pragma unroll
    for (int u = 0; u < F; ++u) v[u] = ld<1>(x + j + u * kTeam);
#pragma unroll
    for (int u = 0; u < F; ++u) {
      const int i = j + u * kTeam;
      cache[i] = v[u];
      addv(o, v[u], th - 8 * i);
    }
  }
  for (; j < ns && j < nv; j += kTeam) {
    const uint4 v = ld<1>(x + j);
    cache[j] = v;
    addv(o, v, th - 8 * j);
  }
  uint4 w[R > 0 ? R : 1];
  const int first = ns + lane;
#pragma unroll
  for (int u = 0; u < R; ++u)
    if (first + u * kTeam < nv) w[u] = ld<1>(x + first + u * kTeam);
#pragma unroll
  for (int u = 0; u < R; ++u)
    if (first + u * kTeam < nv) addv(o, w[u], th - 8 * (first + u * kTeam));
  o = team<kTeam>(o, sm);
  if (lane == 0) whole = make_float2(o.m, o.s);
  cl.sync();
  float m = -INFINITY, s = 0;
  float2 p[C];
#pragma unroll
  for (int k = 0; k < C; ++k) {
    p[k] = *cl.map_shared_rank(&whole, k);
    m = fmaxf(m, p[k].x);
  }
#pragma unroll
  for (int k = 0; k < C; ++k) s += p[k].y * ex2((p[k].x - m) * kLog2e);
  o = {m, s};
  float L, c, ct;
  finish(a, r, o, xt, L, c, ct, lane == 0 && rank == 0);
  for (j = lane; j < ns && j < nv; j += kTeam) st<kSt>(dx + j, gradv(cache[j], o.m, L, c, ct, th - 8 * j));
#pragma unroll
  for (int u = 0; u < R; ++u)
    if (first + u * kTeam < nv)
      st<kSt>(dx + first + u * kTeam, gradv(w[u], o.m, L, c, ct, th - 8 * (first + u * kTeam)));
  cl.sync();  // nobody leaves while its part may be read
}

// V4: the row in registers, R vectors a thread; several rows a block when teams are small
template <int kTeam, int kThreads, int kBlocks, int R, int kSt>
__global__ void __launch_bounds__(kThreads, kBlocks) v4(Args a) {
  __shared__ float sm[64];
  const int nv = a.n / 8, lane = threadIdx.x % kTeam;
  const int64_t r = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kTeam;
  if (r >= a.rows) return;
  const uint4* x = a.x + r * nv;
  uint4* dx = a.dx + r * nv;
  const int t = (int)a.t[r];
  uint4 v[R];
#pragma unroll
  for (int u = 0; u < R; ++u)
    if (lane + u * kTeam < nv) v[u] = ld<1>(x + lane + u * kTeam);
  const float xt = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(x)[t]);
  State o;
#pragma unroll
  for (int u = 0; u < R; ++u)
    if (lane + u * kTeam < nv) addv(o, v[u], t - 8 * (lane + u * kTeam));
  if (kTeam < 32) {
#pragma unroll
    for (int f = kTeam / 2; f; f /= 2) {
      const float m2 = __shfl_xor_sync(~0u, o.m, f), s2 = __shfl_xor_sync(~0u, o.s, f), top = fmaxf(o.m, m2);
      o.s = o.s * ex2((o.m - top) * kLog2e) + s2 * ex2((m2 - top) * kLog2e);
      o.m = top;
    }
  } else
    o = team<kTeam>(o, sm);
  float L, c, ct;
  finish(a, r, o, xt, L, c, ct, lane == 0);
#pragma unroll
  for (int u = 0; u < R; ++u)
    if (lane + u * kTeam < nv)
      st<kSt>(dx + lane + u * kTeam, gradv(v[u], o.m, L, c, ct, t - 8 * (lane + u * kTeam)));
}

// V5: clusters that stay: V2 and V3 together
template <int kTeam, int kBlocks, int R, int C, int kSt>
__global__ void __launch_bounds__(kTeam, kBlocks) v5(Args a) {
  extern __shared__ uint4 cache[];
  __shared__ float sm[64];
  __shared__ float2 parts[2][C];
  cg::cluster_group cl = cg::this_cluster();
  const int rank = cl.block_rank();
  const int all = a.n / 8, per = (all + C - 1) / C, begin = rank * per, nv = min(per, all - begin),
            lane = threadIdx.x, ns = a.slots;
  int64_t r = blockIdx.x / C;
  const int64_t step = gridDim.x / C;
  cl.sync();
  if (r < a.rows)
    for (int j = lane; j < ns && j < nv; j += kTeam) cpa(cache + j, a.x + r * all + begin + j);
  asm volatile("cp.async.commit_group;");
  for (int turn = 0; r < a.rows; r += step, turn ^= 1) {
    const uint4* x = a.x + r * all + begin;
    uint4* dx = a.dx + r * all + begin;
    const int t = (int)a.t[r], th = t - 8 * begin;
    const float xt = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(a.x + r * all)[t]);
    const bool more = r + step < a.rows;
    const uint4* nx = x + step * all;
    uint4 v[R > 0 ? R : 1];
    const int first = ns + lane;
#pragma unroll
    for (int u = 0; u < R; ++u)
      if (first + u * kTeam < nv) v[u] = ld<1>(x + first + u * kTeam);
    asm volatile("cp.async.wait_all;" ::: "memory");
    State o;
    for (int j = lane; j < ns && j < nv; j += kTeam) addv(o, cache[j], th - 8 * j);
#pragma unroll
    for (int u = 0; u < R; ++u)
      if (first + u * kTeam < nv) addv(o, v[u], th - 8 * (first + u * kTeam));
    o = team<kTeam>(o, sm);
    if (lane < C) *cl.map_shared_rank(&parts[turn][rank], lane) = make_float2(o.m, o.s);
    cl.sync();
    float m = -INFINITY, s = 0;
#pragma unroll
    for (int k = 0; k < C; ++k) m = fmaxf(m, parts[turn][k].x);
#pragma unroll
    for (int k = 0; k < C; ++k) s += parts[turn][k].y * ex2((parts[turn][k].x - m) * kLog2e);
    o = {m, s};
    float L, c, ct;
    finish(a, r, o, xt, L, c, ct, lane == 0 && rank == 0);
    for (int j = lane; j < ns && j < nv; j += kTeam) {
      const uint4 q = cache[j];
      if (more) cpa(cache + j, nx + j);
      st<kSt>(dx + j, gradv(q, o.m, L, c, ct, th - 8 * j));
    }
    asm volatile("cp.async.commit_group;");
#pragma unroll
    for (int u = 0; u < R; ++u)
      if (first + u * kTeam < nv)
        st<kSt>(dx + first + u * kTeam, gradv(v[u], o.m, L, c, ct, th - 8 * (first + u * kTeam)));
  }
  cl.sync();
}
// ceilings: copy, and a read alone
__global__ void copyk(const uint4* x, uint4* y, int64_t n) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x)
    __stcs(y + i, ld<1>(x + i));
}
__nv_bfloat16 *X, *Y;
float* loss;
int64_t* T;
std::vector<float> ref;
template <class F>
void timeit(const char* name, int64_t rows, int n, F f) {
  cudaEvent_t a, b;
  cudaEventCreate(&a);
  cudaEventCreate(&b);
  OK(cudaMemset(Y, 0xff, (size_t)rows * n * 2));
  OK(cudaMemset(loss, 0xff, rows * 4));
  f();
  OK(cudaDeviceSynchronize());
  OK(cudaGetLastError());
  std::vector<float> l(rows);
  cudaMemcpy(l.data(), loss, rows * 4, cudaMemcpyDeviceToHost);
  std::vector<uint16_t> g(n);
  cudaMemcpy(g.data(), Y + (rows - 1) * int64_t(n), n * 2, cudaMemcpyDeviceToHost);
  double gs = 0, ga = 0;
  for (auto h : g) {
    unsigned w = unsigned(h) << 16;
    float v;
    memcpy(&v, &w, 4);
    gs += v;
    ga += std::fabs(v);
  }
  double ls = 0;
  for (float v : l) ls += v;
  std::vector<float> ms;
  for (int i = 0; i < 15; ++i) {
    cudaEventRecord(a);
    f();
    cudaEventRecord(b);
    cudaEventSynchronize(b);
    float t;
    cudaEventElapsedTime(&t, a, b);
    ms.push_back(t);
  }
  std::sort(ms.begin(), ms.end());
  printf("%-34s %6lld x %6d  %.4f ms  %.0f GB/s   loss %.5f |g| %.4f sum g %.2e\n", name, (long long)rows, n,
         ms[7], rows * double(n) * 4 / ms[7] / 1e6, ls / rows, ga, gs);
  fflush(stdout);
}
template <class K>
void smem(K k, int bytes) {
  OK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}
// Launches so many clusters of C blocks, or as many as run at once if that is 0.
template <class K>
void cluster(K k, int C, int64_t clusters, int threads, int bytes, Args a, bool say = false) {
  smem(k, bytes);
  if (C > 8) OK(cudaFuncSetAttribute(k, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchConfig_t c = {};
  c.gridDim = dim3(C);
  c.blockDim = dim3(threads);
  c.dynamicSmemBytes = bytes;
  cudaLaunchAttribute at;
  at.id = cudaLaunchAttributeClusterDimension;
  at.val.clusterDim.x = C;
  at.val.clusterDim.y = at.val.clusterDim.z = 1;
  c.attrs = &at;
  c.numAttrs = 1;
  if (!clusters) {
    int active = 0;
    OK(cudaOccupancyMaxActiveClusters(&active, k, &c));
    if (say) printf("  %d clusters of %d: %d blocks\n", active, C, active * C);
    clusters = std::min<int64_t>(a.rows, active);
  }
  c.gridDim = dim3(clusters * C);
  OK(cudaLaunchKernelEx(&c, k, a));
}
int slots(int bytes, int team) { return bytes / (16 * team) * team; }
#define V0(team, blocks, kb, L, S, F)                                             \
  {                                                                               \
    Args b = a;                                                                   \
    b.slots = std::min(slots(kb * 1024, team), n / 8);                            \
    smem(v0<team, blocks, L, S, F>, kb * 1024);                                   \
    timeit("v0 " #team " x" #blocks " " #kb "KB ld" #L " st" #S " F" #F, rows, n, \
           [&] { v0<team, blocks, L, S, F><<<rows, team, kb * 1024>>>(b); });     \
  }
#define V2(team, blocks, kb, R, S)                                                   \
  {                                                                                  \
    Args b = a;                                                                      \
    b.slots = std::min(slots(kb * 1024, team), n / 8);                               \
    if (b.slots + R * team >= n / 8) {                                               \
      smem(v2<team, blocks, R, S>, kb * 1024);                                       \
      timeit("v2 " #team " x" #blocks " " #kb "KB R" #R " st" #S, rows, n,           \
             [&] { v2<team, blocks, R, S><<<132 * blocks, team, kb * 1024>>>(b); }); \
    } else                                                                           \
      printf("v2 " #team " R" #R " row too long\n");                                 \
  }
#define V3(team, blocks, kb, R, C, S, F)                                                      \
  {                                                                                           \
    Args b = a;                                                                               \
    b.slots = slots(kb * 1024, team);                                                         \
    int per = (n / 8 + C - 1) / C;                                                            \
    if (b.slots > per) b.slots = (per + team - 1) / team * team;                              \
    if (b.slots + R * team >= per)                                                            \
      timeit("v3 " #team " x" #blocks " " #kb "KB R" #R " C" #C " st" #S " F" #F, rows, n,    \
             [&] { cluster(v3<team, blocks, R, C, S, F>, C, rows, team, b.slots * 16, b); }); \
    else                                                                                      \
      printf("v3 " #team " C" #C " row too long\n");                                          \
  }
#define V4(team, threads, blocks, R, S)                                     \
  if (R * team >= n / 8)                                                    \
    timeit("v4 " #team "/" #threads " x" #blocks " R" #R " st" #S, rows, n, \
           [&] { v4<team, threads, blocks, R, S><<<(rows * team + threads - 1) / threads, threads>>>(a); });

#define V5(team, blocks, kb, R, C, S)                                                          \
  {                                                                                            \
    Args b = a;                                                                                \
    b.slots = slots(kb * 1024, team);                                                          \
    int per = (n / 8 + C - 1) / C;                                                             \
    if (b.slots > per) b.slots = (per + team - 1) / team * team;                               \
    if (b.slots + R * team >= per) {                                                           \
      cluster(v5<team, blocks, R, C, S>, C, 0, team, b.slots * 16, b, true);                   \
      timeit("v5 " #team " x" #blocks " " #kb "KB R" #R " C" #C " st" #S, rows, n,             \
             [&] { cluster(v5<team, blocks, R, C, S>, C, 0, team, b.slots * 16, b, false); }); \
    } else                                                                                     \
      printf("v5 " #team " C" #C " row too long\n");                                           \
  }

int main() {
  const int64_t most = int64_t(8192) * 128256 + 1024;
  OK(cudaMalloc(&X, most * 2));
  OK(cudaMalloc(&Y, most * 2));
  OK(cudaMalloc(&loss, 8 << 20));
  OK(cudaMalloc(&T, 1 << 20));
  init<<<2048, 256>>>(X, most);
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = i == 0 ? most * 2 : i == 1 ? 32768ll * 8192 * 2 : 32768ll * 1024 * 2;
    timeit("copy", bytes / 2 / 1024, 1024,
           [&] { copyk<<<132 * 16, 512>>>((uint4*)X, (uint4*)Y, bytes / 16); });
    timeit("cudaMemcpy", bytes / 2 / 1024, 1024,
           [&] { cudaMemcpyAsync(Y, X, bytes, cudaMemcpyDeviceToDevice); });
  }
  for (int n : {262144, 128256, 65536, 32768, 16384, 8192, 4096, 1024, 512, 256}) {
    const int64_t rows = n == 262144  ? 4000
                         : n >= 16384 ? most / n / 132 * 132 / (n < 128256 ? 2 : 1) + (n == 128256 ? 8 : 0)
                                      : 32768;
    std::vector<int64_t> t(rows);
    for (int64_t i = 0; i < rows; ++i) t[i] = (i * 7919) % n;
    cudaMemcpy(T, t.data(), rows * 8, cudaMemcpyHostToDevice);
    Args a{(uint4*)X, (uint4*)Y, T, loss, rows, n, 0, 1.f};
    if (n >= 128256) {
      V5(1024, 1, 208, 3, 2, 1);
      V5(1024, 1, 208, 3, 2, 0);
      V5(1024, 1, 132, 0, 4, 1);
      V5(512, 2, 104, 3, 4, 1);
      V5(512, 2, 104, 3, 4, 0);
      V5(512, 2, 66, 0, 8, 1);
      V5(256, 4, 52, 3, 8, 1);
      V5(256, 4, 52, 3, 8, 0);
      V5(1024, 1, 132, 0, 2, 1);
      V5(512, 2, 104, 3, 2, 1);
      V5(512, 2, 104, 3, 2, 0);
      V5(256, 4, 52, 3, 4, 1);
    }
    if (n >= 16384) {
      V0(1024, 1, 220, 0, 0, 4);
      V0(1024, 1, 220, 1, 0, 4);
      V0(1024, 1, 220, 0, 1, 4);
      V0(1024, 1, 220, 1, 1, 4);
      V0(512, 2, 108, 1, 1, 4);
      V0(512, 2, 108, 1, 0, 4);
      V0(512, 2, 108, 1, 1, 8);
      V0(512, 3, 72, 1, 1, 4);
      V0(256, 4, 54, 1, 1, 4);
      V0(512, 2, 1, 1, 1, 4);
      V2(1024, 1, 208, 3, 0);
      V2(1024, 1, 208, 3, 1);
      V2(512, 1, 208, 6, 1);
      V2(512, 2, 104, 3, 1);
      V2(512, 2, 104, 3, 0);
      V2(256, 4, 52, 3, 1);
      V3(512, 2, 104, 3, 2, 1, 4);
      V3(512, 2, 104, 3, 2, 0, 4);
      V3(512, 2, 64, 0, 4, 1, 4);
      V3(512, 3, 64, 0, 4, 1, 4);
      V3(256, 4, 52, 3, 4, 1, 4);
      V3(256, 6, 32, 0, 8, 1, 4);
      V3(512, 3, 64, 0, 4, 0, 4);
      V3(256, 6, 32, 0, 8, 0, 4);
      V3(1024, 1, 208, 0, 2, 1, 4);
      V3(512, 3, 32, 0, 8, 1, 4);
    }
    if (n <= 16384 && n >= 2048) {
      V0(128, 8, 16, 1, 1, 4);
      V0(256, 4, 32, 1, 1, 4);
      V0(128, 8, 16, 0, 0, 4);
      V4(128, 128, 8, 8, 1);
      V4(128, 128, 8, 4, 1);
      V4(256, 256, 4, 4, 1);
      V4(256, 256, 5, 4, 1);
      V4(256, 256, 4, 8, 1);
      V4(512, 512, 2, 4, 1);
      V4(256, 256, 4, 4, 0);
      V4(512, 512, 2, 2, 1);
      V4(256, 256, 6, 2, 1);
      V4(32, 128, 8, 16, 1);
      V2(128, 8, 26, 1, 1);
      V2(256, 4, 52, 1, 1);
      V2(128, 12, 16, 1, 1);
    }
    if (n <= 1024) {
      V4(32, 128, 8, 4, 1);
      V4(32, 128, 12, 4, 1);
      V4(32, 128, 12, 2, 1);
      V4(32, 128, 16, 1, 1);
      V4(16, 128, 8, 8, 1);
      V4(16, 128, 12, 4, 1);
      V4(16, 128, 16, 2, 1);
      V4(8, 128, 12, 4, 1);
      V4(8, 128, 8, 8, 1);
      V4(32, 256, 6, 4, 1);
      V4(4, 128, 8, 8, 1);
      V4(32, 128, 12, 4, 0);
      V4(8, 128, 12, 4, 0);
    }
  }
}
