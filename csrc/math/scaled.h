// Factors of 0.
#pragma once
#include <limits>

#include "math.h"

namespace fastloss::inline FL_ISA {

// c x; a factor of 0 takes nothing of x, be it NaN or infinite. c is of the type of x, or a number for all of
// a vector's lanes.
template <class C, class X>
FL_FN X scaled(C c, X x) {
  return c == 0 ? X{} : X(x * c);
}
// a b of two factors, which is 0 only if one of them is.
template <class R>
FL_FN R product_of_factors(R a, R b) {
  const R p = a * b;
  constexpr R least = std::numeric_limits<R>::denorm_min();
  return p == 0 && a != 0 && b != 0 ? least : p;
}

}  // namespace fastloss::inline FL_ISA
