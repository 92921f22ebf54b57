// Two vectors as one type. A loss is a long dependency chain, longer than out-of-order execution looks
// ahead: two interleaved chains hide half of its latency.
#pragma once
#include "vector_math.h"

namespace fastloss::inline FL_ISA {

template <class V>
struct VectorPair {
  V a, b;
};
template <class V>
struct Lanes<VectorPair<V>> {
  using scalar = scalar_t<V>;
  static FL_FN VectorPair<V> fill(scalar x) { return {Lanes<V>::fill(x), Lanes<V>::fill(x)}; }
};

#define FL_PAIR_OPERATOR(op)                                               \
  template <class V>                                                       \
  FL_FN auto operator op(const VectorPair<V>& x, const VectorPair<V>& y) { \
    return VectorPair<decltype(x.a op y.a)>{x.a op y.a, x.b op y.b};       \
  }                                                                        \
  template <class V, class S>                                              \
    requires std::is_arithmetic_v<S>                                       \
  FL_FN auto operator op(const VectorPair<V>& x, S y) {                    \
    const auto s = static_cast<scalar_t<V>>(y);                            \
    return VectorPair<decltype(x.a op s)>{x.a op s, x.b op s};             \
  }                                                                        \
  template <class V, class S>                                              \
    requires std::is_arithmetic_v<S>                                       \
  FL_FN auto operator op(S x, const VectorPair<V>& y) {                    \
    const auto s = static_cast<scalar_t<V>>(x);                            \
    return VectorPair<decltype(s op y.a)>{s op y.a, s op y.b};             \
  }
FL_PAIR_OPERATOR(+)
FL_PAIR_OPERATOR(-)
FL_PAIR_OPERATOR(*)
FL_PAIR_OPERATOR(/)
FL_PAIR_OPERATOR(<)
FL_PAIR_OPERATOR(<=)
FL_PAIR_OPERATOR(>)
FL_PAIR_OPERATOR(>=)
FL_PAIR_OPERATOR(==)
FL_PAIR_OPERATOR(!=)
#undef FL_PAIR_OPERATOR

// for the masks that comparisons give
template <class M>
FL_FN VectorPair<M> operator&(const VectorPair<M>& x, const VectorPair<M>& y) {
  return {x.a & y.a, x.b & y.b};
}
template <class M>
FL_FN VectorPair<M> operator|(const VectorPair<M>& x, const VectorPair<M>& y) {
  return {x.a | y.a, x.b | y.b};
}
template <class M, class V>
FL_FN VectorPair<V> select(const VectorPair<M>& c, const VectorPair<V>& x, const VectorPair<V>& y) {
  return {select(c.a, x.a, y.a), select(c.b, x.b, y.b)};
}

template <class V>
FL_FN VectorPair<V> operator-(const VectorPair<V>& x) {
  return {-x.a, -x.b};
}
template <class V, class X>
FL_FN VectorPair<V>& operator+=(VectorPair<V>& x, const X& y) {
  return x = x + y;
}
template <class V, class X>
FL_FN VectorPair<V>& operator-=(VectorPair<V>& x, const X& y) {
  return x = x - y;
}
template <class V, class X>
FL_FN VectorPair<V>& operator*=(VectorPair<V>& x, const X& y) {
  return x = x * y;
}

#define FL_PAIR_FUNCTION(f)                       \
  template <class V>                              \
  FL_FN VectorPair<V> f(const VectorPair<V>& x) { \
    return {f(x.a), f(x.b)};                      \
  }
FL_PAIR_FUNCTION(abs)
FL_PAIR_FUNCTION(exp)
FL_PAIR_FUNCTION(exp_down)
FL_PAIR_FUNCTION(expm1)
FL_PAIR_FUNCTION(log)
FL_PAIR_FUNCTION(log1p)
FL_PAIR_FUNCTION(log1p_unit)
FL_PAIR_FUNCTION(sqrt)
FL_PAIR_FUNCTION(tanh)
#undef FL_PAIR_FUNCTION
#define FL_PAIR_FUNCTION(f)                                               \
  template <class V>                                                      \
  FL_FN VectorPair<V> f(const VectorPair<V>& x, const VectorPair<V>& y) { \
    return {f(x.a, y.a), f(x.b, y.b)};                                    \
  }
FL_PAIR_FUNCTION(max)
FL_PAIR_FUNCTION(min)
FL_PAIR_FUNCTION(copysign)
#undef FL_PAIR_FUNCTION

template <class R>
FL_FN VectorPair<vector_t<R>> load_pair(const R* p) {
  return {load(p), load(p + kLanes<vector_t<R>>)};
}
template <class T, class V>
FL_FN void store(T* p, const VectorPair<V>& v) {
  store(p, v.a);
  store(p + kLanes<V>, v.b);
}

}  // namespace fastloss::inline FL_ISA
