// The one header of math/ that formulas and drivers include: it selects the functions by the compiler. They
// have to be declared before a formula that calls exp, max or select: vectors are builtin types, for which
// there is no argument-dependent lookup when a template is instantiated.
//
//   a CPU kernel (the build names its instruction set, FL_ISA)    scalars, vectors, pairs of vectors
//   nvcc                                                          scalars; in device code the GPU's functions
//   a CUDA kernel on the CPU (the build sets FL_DEVICE_MATH)      scalars, by the GPU's approximate functions
//   operators (none of these)                                     scalars
#pragma once
#include "scalar_math.h"
#if defined(FL_VECTORS)
#include "vector_pair.h"
#endif
#include "logit.h"

namespace fastloss::inline FL_ISA {

// a * b that a GPU rounds for itself, so that all copies of a loop give the same bits: its assembler folds a
// product into a sum in one copy and not in another. Elsewhere, and for vectors, a plain product.
template <class F>
FL_FN F alone(F a, F b) {
  return a * b;
}
#ifdef __CUDA_ARCH__
template <>
FL_FN float alone(float a, float b) {
  return __fmul_rn(a, b);
}
template <>
FL_FN double alone(double a, double b) {
  return __dmul_rn(a, b);
}
#endif

}  // namespace fastloss::inline FL_ISA
