// Scalar maths. A loss is written over a type F: float or double on the GPU and for per-row values, a SIMD
// vector (math/simd.h) for the elements of a row on the CPU.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FL_FN __host__ __device__ __forceinline__
#else
#define FL_FN inline __attribute__((always_inline))
#endif
#if defined(__CUDACC__) || defined(FL_DEVICE_MATH)
#include "../cuda/ptx.cuh"
#endif

#define FL_NOINLINE __attribute__((noinline))

// Everything that depends on the instruction set lives in an inline namespace named after it, so that the
// copies compiled for different sets are different functions to the linker. FL_VECTORS: there is such a set.
#if defined(FL_ISA)
#define FL_VECTORS
#else
#define FL_ISA generic
#endif

namespace fastloss::inline FL_ISA {

template <class R>
inline constexpr R kLog2e = R(1.4426950408889634);

FL_FN float exp(float x) {
#if defined(__CUDA_ARCH__) || defined(FL_DEVICE_MATH)
  return cuda::exp2_approx(x * kLog2e<float>);  // 2 ulp + |x| * 2^-24, and x is at most 0 here
#else
  return ::expf(x);
#endif
}
FL_FN double exp(double x) { return ::exp(x); }
// For x <= 0, to 3 ulp; cheaper than exp for vectors, and on a GPU than expf, of which it needs five of eight
// instructions. Results below 2^-126 are 0 there.
FL_FN float exp_down(float x) {
#if defined(__CUDA_ARCH__) || defined(FL_DEVICE_MATH)
  const float t = x * kLog2e<float>, y = cuda::exp2_approx(t);
  // what the rounding of t left of x; 1 (any finite number) where t is infinite and y is 0
  const float rest = ::fminf(::fmaf(t, -0.693147181f, x), 1.f);
  return ::fmaf(y, rest, y);
#else
  return ::expf(x);
#endif
}
FL_FN double exp_down(double x) { return ::exp(x); }
FL_FN float log(float x) { return ::logf(x); }
FL_FN double log(double x) { return ::log(x); }
FL_FN float log1p(float x) { return ::log1pf(x); }
FL_FN double log1p(double x) { return ::log1p(x); }
FL_FN float pow(float x, float y) { return ::powf(x, y); }
FL_FN double pow(double x, double y) { return ::pow(x, y); }
FL_FN float sqrt(float x) { return ::sqrtf(x); }
FL_FN double sqrt(double x) { return ::sqrt(x); }
FL_FN float expm1(float x) { return ::expm1f(x); }
FL_FN double expm1(double x) { return ::expm1(x); }
FL_FN float tanh(float x) { return ::tanhf(x); }
FL_FN double tanh(double x) { return ::tanh(x); }
FL_FN float max(float a, float b) { return a > b ? a : b; }
FL_FN double max(double a, double b) { return a > b ? a : b; }
// The same as one instruction on a GPU, without a branch; a NaN is dropped.
FL_FN float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  return ::fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
FL_FN double larger(double a, double b) { return a > b ? a : b; }
FL_FN float min(float a, float b) { return a < b ? a : b; }
FL_FN double min(double a, double b) { return a < b ? a : b; }
FL_FN float abs(float x) { return ::fabsf(x); }
FL_FN double abs(double x) { return ::fabs(x); }
FL_FN float copysign(float size, float sign) { return ::copysignf(size, sign); }
FL_FN double copysign(double size, double sign) { return ::copysign(size, sign); }
FL_FN float select(bool c, float a, float b) { return c ? a : b; }
FL_FN double select(bool c, double a, double b) { return c ? a : b; }
// log(1 + u) only for u in [0, 1], as in softplus, within two units in the last place: half the work of log1p
// for vectors, less on a GPU
FL_FN float log1p_unit(float u) {
#if defined(__CUDA_ARCH__) || defined(FL_DEVICE_MATH)
  float p = 5.126102361828089e-3f;  // of log(1 + u) / u, within 4e-8
  p = ::fmaf(p, u, -2.9074065387248993e-2f);
  p = ::fmaf(p, u, 7.75160863995552e-2f);
  p = ::fmaf(p, u, -1.3602247834205627e-1f);
  p = ::fmaf(p, u, 1.9076880812644958e-1f);
  p = ::fmaf(p, u, -2.483539879322052e-1f);
  p = ::fmaf(p, u, 3.331812024116516e-1f);
  p = ::fmaf(p, u, -4.999944567680359e-1f);
  return ::fmaf(p * u, u, u);
#else
  return ::log1pf(u);
#endif
}
FL_FN double log1p_unit(double u) { return ::log1p(u); }

// x rounded to its type: keeps the compiler from folding the product x into a fused multiply-add, where two
// equal products must cancel exactly. The assembler of GPUs folds too, across an empty asm, but not into a
// sum whose rounding is named.
FL_FN float rounded(float x) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(x, -0.f);
#else
  asm("" : "+x"(x));
  return x;
#endif
}
FL_FN double rounded(double x) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(x, -0.);
#else
  asm("" : "+x"(x));
  return x;
#endif
}
// rounded(a * b): on a GPU just a product with explicit rounding.
FL_FN float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return rounded(a * b);
#endif
}
FL_FN double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return rounded(a * b);
#endif
}

// The type in which the elements of T are summed.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

// The scalar of F, and F from a scalar: the identity for scalars; math/simd.h adds the vectors.
template <class F>
struct Lanes {
  using scalar = F;
  static FL_FN F fill(F x) { return x; }
};
template <class F>
using scalar_t = typename Lanes<F>::scalar;
template <class F>
FL_FN F fill(scalar_t<F> x) {
  return Lanes<F>::fill(x);
}

}  // namespace fastloss::inline FL_ISA
