// Survival losses for one instruction set: compiled once for each, with FL_ISA naming it. One thread takes a
// whole cohort.
#include "survival.h"

#include "../../losses/survival.h"
#include "../../math/math.h"
#include "../scratch.h"

namespace fastloss::inline FL_ISA {
namespace {

template <class T>
struct Score {
  const T* x;
  FL_FN double operator()(int64_t i) const { return widen(x[i]); }
};

template <class Item, class Loss, class Read>
FL_FN void scan(const Loss& loss, const Read& read) {
  Item sum;
  for (int64_t i = 0; i < loss.n; ++i) {
    const int64_t p = Item::kReversed ? loss.n - 1 - i : i;
    sum = sum.then(read(p));
    loss.save(p, sum);
  }
}

template <template <class> class Loss, class T>
FL_NOINLINE void cohort(SurvivalArgs a, int64_t row) {
  using L = Loss<Score<T>>;
  if (a.backward)
    a.slope = static_cast<double*>(cpu::thread_scratch(a.n * 2 * sizeof(double))) - row * a.n * 2;
  const L loss(a, row, Score<T>{static_cast<const T*>(a.score)});
  if (a.backward) {
    scan<typename L::Back>(loss, [&](int64_t p) { return loss.back(p); });
    for (int64_t p = 0; p < loss.n; ++p)
      store_one(static_cast<T*>(a.gradient) + loss.individual(p), acc_t<T>(loss.gradient(p)));
    return;
  }
  scan<typename L::Forward>(loss, [&](int64_t p) { return loss.forward(p); });
  double total = 0;
  for (int64_t p = 0; p < loss.n; ++p) {
    const double v = loss.value(p);
    total += v;
    if (a.loss) a.loss[loss.individual(p)] = v;
  }
  a.partial[row] = total;
}

template <class T>
void run_rows(const SurvivalArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    a.kind == Survival::cox ? cohort<Cox, T>(a, row) : cohort<Dart, T>(a, row);
}
void run(const SurvivalArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T> { run_rows<T>(a, begin, end); });
}

}  // namespace
}  // namespace fastloss::inline FL_ISA

namespace fastloss::cpu {
FASTLOSS_OF_ISA(SurvivalKernel, survival_kernel) = &run;
}  // namespace fastloss::cpu
