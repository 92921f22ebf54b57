// The functions that formulas are made of, for whoever compiles them. A formula names exp, max or select
// where it is defined, and only what is known there is found: vectors of the compiler have no namespace in
// which it would look later. So this is the one header of math/ that formulas and drivers include, and the
// one place where it is decided what they are given:
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
