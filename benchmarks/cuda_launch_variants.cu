// What the small kernels around a loss of short rows cost, and what would make them cheaper: the norm of 32768 rows,
// the rows themselves, the sum of their losses, and a backward kernel that finds nothing to do, as replays of a CUDA
// graph over a flushed cache. Standalone; what it found is in NOTES.md.
//
//   nvcc -O3 -std=c++20 -arch=sm_90 cuda_launch_variants.cu -o cuda_launch_variants && ./cuda_launch_variants
//
// Sums by two launches, a cluster of 8 blocks, or one block; "overlapped": each kernel may start while the one before
// ends (programmatic dependent launch), and waits where it needs what that has written.
#include "cuda_variants.cuh"

// V4: the row in registers, R vectors a thread; several rows a block when teams are small
template <int kTeam, int kThreads, int kBlocks, int R, int kSt>
__global__ void __launch_bounds__(kThreads, kBlocks) v4(Args a) {
  __shared__ float sm[64];
  if (a.g == 0) asm volatile("griddepcontrol.launch_dependents;");
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
  if (a.norm) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    a.g = 1 / *a.norm;
  }
  float L, c, ct;
  finish(a, r, o, xt, L, c, ct, lane == 0);
#pragma unroll
  for (int u = 0; u < R; ++u)
    if (lane + u * kTeam < nv)
      st<kSt>(dx + lane + u * kTeam, gradv(v[u], o.m, L, c, ct, t - 8 * (lane + u * kTeam)));
}

constexpr int kChunk = 4096;
D float block_sum(float s) {
  __shared__ float sm[32];
#pragma unroll
  for (int f = 16; f; f /= 2) s += __shfl_xor_sync(~0u, s, f);
  if (threadIdx.x % 32 == 0) sm[threadIdx.x / 32] = s;
  __syncthreads();
  s = threadIdx.x < 32 && threadIdx.x < blockDim.x / 32 ? sm[threadIdx.x] : 0;
#pragma unroll
  for (int f = 16; f; f /= 2) s += __shfl_xor_sync(~0u, s, f);
  return s;
}
struct Small {
  const int64_t* t;
  const float* loss;
  float* parts;
  float* out;
  int64_t rows;
  const float* up;
};
template <bool kNorm>
D float value(const Small& a, int64_t i) {
  return kNorm ? (a.t[i] != -100 ? 1.f : 0.f) : a.loss[i];
}
template <bool kNorm>
__global__ void partial(Small a) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float s = 0;
#pragma unroll
  for (int i = 0; i < kChunk / 256; ++i) {
    const int64_t j = blockIdx.x * int64_t(kChunk) + i * 256 + threadIdx.x;
    if (j < a.rows) s += value<kNorm>(a, j);
  }
  s = block_sum(s);
  if (threadIdx.x == 0) a.parts[blockIdx.x] = s;
}
template <bool kNorm>
__global__ void total(Small a, int n) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += a.parts[i];
  s = block_sum(s);
  if (threadIdx.x == 0) *a.out = s;
}
template <bool kNorm, int C>
__global__ void __launch_bounds__(1024) clustered(Small a) {
  __shared__ float parts[C];
  cg::cluster_group cl = cg::this_cluster();
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float s = 0;
  const int64_t per = (a.rows + C - 1) / C, begin = cl.block_rank() * per, end = min(a.rows, begin + per);
#pragma unroll 4
  for (int64_t j = begin + threadIdx.x; j < end; j += 1024) s += value<kNorm>(a, j);
  s = block_sum(s);
  cl.sync();
  if (threadIdx.x == 0) *cl.map_shared_rank(&parts[cl.block_rank()], 0) = s;
  cl.sync();
  if (cl.block_rank() == 0 && threadIdx.x == 0) {
    float q = 0;
    for (int i = 0; i < C; ++i) q += parts[i];
    *a.out = q;
  }
}
template <bool kNorm>
__global__ void __launch_bounds__(1024) alone(Small a) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float s = 0;
#pragma unroll 8
  for (int64_t j = threadIdx.x; j < a.rows; j += 1024) s += value<kNorm>(a, j);
  s = block_sum(s);
  if (threadIdx.x == 0) *a.out = s;
}
__global__ void tail(Small a) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (*a.up == 1) return;
  a.out[1 + blockIdx.x * 128 + threadIdx.x] = 0;
}
template <class K, class... A>
void go(K k, int64_t grid, int block, int C, bool pdl, cudaStream_t s, A... args) {
  cudaLaunchConfig_t c = {};
  c.gridDim = dim3(grid);
  c.blockDim = dim3(block);
  c.stream = s;
  cudaLaunchAttribute at[2];
  int n = 0;
  if (C > 1) {
    at[n].id = cudaLaunchAttributeClusterDimension;
    at[n].val.clusterDim.x = C;
    at[n].val.clusterDim.y = at[n].val.clusterDim.z = 1;
    ++n;
  }
  if (pdl) {
    at[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    at[n].val.programmaticStreamSerializationAllowed = 1;
    ++n;
  }
  c.attrs = at;
  c.numAttrs = n;
  OK(cudaLaunchKernelEx(&c, k, args...));
}
int main() {
  const int64_t rows = 32768;
  cudaStream_t s;
  OK(cudaStreamCreate(&s));
  uint4 *X, *Y;
  float *loss, *parts, *out;
  int64_t* T;
  char* flush;
  float* one;
  OK(cudaMalloc(&X, rows * 1024 * 2));
  OK(cudaMalloc(&Y, rows * 1024 * 2));
  OK(cudaMalloc(&loss, rows * 4));
  OK(cudaMalloc(&parts, 4096));
  OK(cudaMalloc(&out, 1 << 24));
  OK(cudaMalloc(&T, rows * 8));
  OK(cudaMalloc(&flush, 120 << 20));
  OK(cudaMalloc(&one, 4));
  const float h = 1;
  cudaMemcpy(one, &h, 4, cudaMemcpyHostToDevice);
  init<<<2048, 256>>>((__nv_bfloat16*)X, rows * 1024);
  const char* names[] = {"rows alone",
                         "norm, rows, sum, tail: two launches each",
                         "the same, overlapped",
                         "clusters of 8",
                         "clusters of 8, overlapped",
                         "one block",
                         "one block, overlapped",
                         "clusters of 8 overlapped, launch_dependents late in rows",
                         "tail alone",
                         "norm in two",
                         "norm by cluster of 8",
                         "norm by cluster 16",
                         "norm by one block"};
  for (int n : {256, 512, 1024}) {
    std::vector<int64_t> t(rows);
    for (int64_t i = 0; i < rows; ++i) t[i] = (i * 7919) % n;
    cudaMemcpy(T, t.data(), rows * 8, cudaMemcpyHostToDevice);
    for (int v = 0; v < 13; ++v) {
      const bool pdl = v == 2 || v == 4 || v == 6 || v == 7;
      Args a{X, Y, T, loss, rows, n, 0, v == 7 ? 1.f : 0.f, out};
      if (v == 0) a.norm = nullptr, a.g = 1;
      Small p{T, loss, parts, out, rows, one}, q{T, loss, parts, out + 1, rows, one};
      const auto chain = [&] {
        const int k = v == 1 || v == 2 || v == 9              ? 1
                      : v == 3 || v == 4 || v == 7 || v == 10 ? 2
                      : v == 11                               ? 4
                      : v == 0 || v == 8                      ? 0
                                                              : 3;
        if (k == 1) {
          go(partial<true>, 8, 256, 1, false, s, p);
          go(total<true>, 1, 256, 1, pdl, s, p, 8);
        }
        if (k == 2) go(clustered<true, 8>, 8, 1024, 8, false, s, p);
        if (k == 3) go(alone<true>, 1, 1024, 1, false, s, p);
        if (k == 4) go(clustered<true, 4>, 4, 1024, 4, false, s, p);
        if (v > 8) return;
        if (v != 8) {
          if (n == 256)
            go(v4<8, 128, 12, 4, 1>, rows * 8 / 128, 128, 1, pdl, s, a);
          else if (n == 512)
            go(v4<16, 128, 12, 4, 1>, rows * 16 / 128, 128, 1, pdl, s, a);
          else
            go(v4<32, 128, 12, 4, 1>, rows * 32 / 128, 128, 1, pdl, s, a);
        }
        if (k == 1) {
          go(partial<false>, 8, 256, 1, pdl, s, q);
          go(total<false>, 1, 256, 1, pdl, s, q, 8);
        }
        if (k == 2) go(clustered<false, 8>, 8, 1024, 8, pdl, s, q);
        if (k == 3) go(alone<false>, 1, 1024, 1, pdl, s, q);
        if (v != 0) go(tail, 132 * 16, 128, 1, pdl, s, q);
      };
      cudaGraph_t g;
      cudaGraphExec_t e;
      OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
      chain();
      OK(cudaStreamEndCapture(s, &g));
      OK(cudaGraphInstantiate(&e, g, 0));
      std::vector<float> ms;
      cudaEvent_t x, y;
      cudaEventCreate(&x);
      cudaEventCreate(&y);
      for (int i = 0; i < 60; ++i) {
        OK(cudaMemsetAsync(flush, i, 120 << 20, s));
        cudaEventRecord(x, s);
        OK(cudaGraphLaunch(e, s));
        cudaEventRecord(y, s);
        OK(cudaEventSynchronize(y));
        float f;
        cudaEventElapsedTime(&f, x, y);
        ms.push_back(f);
      }
      std::sort(ms.begin(), ms.end());
      float r[2];
      cudaMemcpy(r, out, 8, cudaMemcpyDeviceToHost);
      printf("%4d classes  %-58s %7.2f us   norm %.0f loss %.4f\n", n, names[v], ms[30] * 1e3, r[0],
             r[1] / rows);
      fflush(stdout);
    }
  }
}
