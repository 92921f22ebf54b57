// Kernels whose machine code is known, so that a reader of machine code which sees nothing is found
// (test_machine_code.py).
#include <cstdint>

extern "C" {

// Loads of 16 bytes, four on their way; 4 floats each, and 4 stores.
__global__ void __launch_bounds__(256) four_loads(const float4* x, float4* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i + 3 * 256 < n; i += 4 * 256) {
    float4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = x[i + k * 256];
#pragma unroll
    for (int k = 0; k < 4; ++k) y[i + k * 256] = make_float4(v[k].x * v[k].y, v[k].z, v[k].w, v[k].x + 1);
  }
}
// One load on its way, of 4 bytes, since each address is a value loaded before.
__global__ void __launch_bounds__(128) one_load(const int* x, int* y, int n) {
  int at = threadIdx.x;
#pragma unroll 1
  for (int i = 0; i < n; ++i) at = x[at];
  y[threadIdx.x] = at;
}
// A rare branch of many instructions, which is not on the hot path, and in it a call: a division of 64 bits.
__global__ void __launch_bounds__(128) rare(const float* x, int64_t* y, int n, int64_t d) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) {
    int64_t v = static_cast<int64_t>(x[i]);
    if (v > 1000) v = (v * v + 7) / (d + v) + v % (d + 3);
    y[i] = v;
  }
}
// A call in every iteration.
__noinline__ __device__ float called(float v) { return v > 0 ? __expf(v) : v * v; }
__global__ void __launch_bounds__(128) calls(const float* x, float* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) y[i] = called(x[i]);
}
// A local array that is indexed by a variable.
__global__ void local_array(const float* x, float* y, const int* at) {
  float v[40];
#pragma unroll
  for (int k = 0; k < 40; ++k) v[k] = x[k];
  y[0] = v[at[0]];
  v[at[1]] = 1;
  y[1] = v[at[2]];
}
// 40 values at once in 32 registers.
__global__ void __launch_bounds__(1024, 2) spill(const float* x, float* y) {
  float v[40];
#pragma unroll
  for (int k = 0; k < 40; ++k) v[k] = x[k * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 40; ++k) y[k * 1024 + threadIdx.x] = v[k] * v[(k * 7 + 3) % 40];
}
__global__ void atomic_float(float* x) { atomicAdd(x, 1.f); }
__global__ void atomic_double_result(double* x) { x[1] = atomicAdd(x, 1.0); }
__global__ void atomic_shared(float* x) {
  __shared__ float s;
  s = 0;
  __syncthreads();
  atomicAdd(&s, x[threadIdx.x]);
  __syncthreads();
  x[0] = s;
}
__global__ void atomic_integer(int* x) { atomicAdd(x, 1); }

}  // extern "C"
