// Expressions whose products must be rounded for themselves, as the kernels compile them (test_machine_code.py
// finds no multiply-add in them), and the same as plain expressions (there it must).
#include "../../csrc/cuda/kernels/row_sums.cuh"
#include "../../csrc/losses/classification.h"
#include "../../csrc/losses/distillation.h"
#include "../../csrc/math/online_softmax.h"

namespace fastloss {

template <class R>
__global__ void plain(R* x) {
  x[4] = x[0] * x[1] - x[2] * x[3];
}
template <class R>
__global__ void with_product(R* x) {
  x[4] = product(x[0], x[1]) - product(x[2], x[3]);
}
template <class R>
__global__ void with_rounded(R* x) {
  x[4] = rounded(x[0] * x[1]) - rounded(x[2] * x[3]);
}
template <class R>
__global__ void with_alone(R* x) {
  x[4] = alone(x[0], x[1]) - alone(x[2], x[3]);
}

// The gradient of a class and of the target: of a row of one class exactly 0.
template <class R, int kTargets>
__global__ void cross_entropy(const R* x, R* y, CrossEntropy<R, kTargets> loss) {
  const typename CrossEntropy<R, kTargets>::GradCoef c{x[0], x[1], x[2], x[3], x[4]};
  y[0] = loss.grad_at_target(x[5], x[6], x[7], c);
  y[1] = loss.grad(x[8], x[9], R(1), x[11], c);
}
template <class R, int kAll>
__global__ void token_statistics(const R* x, R* y, TokenStats<R, kAll> loss) {
  const typename TokenStats<R, kAll>::GradCoef c{x[0], x[1], x[2], x[3], x[4], x[5]};
  y[0] = loss.grad(x[6], x[7], x[8], x[9], c);
}
// A logit less its maximum, and the difference of log-probabilities, as in cuda/kernels/distillation.cu.
template <class R, int kKind>
__global__ void divergence(const R* x, R* y, LogitDivergence<R, kKind> loss) {
  const R student = rounded(x[0] * x[1]) - x[2], teacher = rounded(x[3] * x[1]) - x[4];
  const auto s = loss.log_ratios(student, teacher, x[5]);
  y[0] = s.u;
  y[1] = s.v;
}

// Two sums of exponentials, which both sides of an exchange merge.
template <class R>
__global__ void online_softmax(R* x) {
  OnlineSoftmax<R> o{x[0], x[1]};
  o.merge({x[2], x[3]});
  x[4] = o.sum;
}

// The sums of two parts of a row, as in cuda/kernels/rows.cuh.
template <class R>
__global__ void parts(R* x, cuda::Unit<R> unit) {
  cuda::Online<CrossEntropy<R, kHard>, R> o;
  o.m = x[0];
  o.s = x[1];
  o.merge(x[2], x[3], unit);
  x[4] = o.m;
  x[5] = o.s;
}
template __global__ void parts<float>(float*, cuda::Unit<float>);
template __global__ void online_softmax<float>(float*);

#define FOR_TYPE(R)                                                                   \
  template __global__ void plain<R>(R*);                                              \
  template __global__ void with_product<R>(R*);                                       \
  template __global__ void with_rounded<R>(R*);                                       \
  template __global__ void with_alone<R>(R*);                                         \
  template __global__ void cross_entropy<R>(const R*, R*, CrossEntropy<R, kHard>);    \
  template __global__ void cross_entropy<R>(const R*, R*, CrossEntropy<R, kSmooth>);  \
  template __global__ void cross_entropy<R>(const R*, R*, CrossEntropy<R, kSoft>);    \
  template __global__ void token_statistics<R>(const R*, R*, TokenStats<R, 0>);       \
  template __global__ void token_statistics<R>(const R*, R*, TokenStats<R, 1>);       \
  template __global__ void divergence<R>(const R*, R*, LogitDivergence<R, kForward>); \
  template __global__ void divergence<R>(const R*, R*, LogitDivergence<R, kReverse>);
FOR_TYPE(float)
FOR_TYPE(double)

}  // namespace fastloss
