// Loads and stores with a cache hint, atomics, fences and asynchronous copies. Included by simt.h.
#pragma once
#include "simt.h"

// Inlined, so that what a kernel did is reported at the kernel's line.
#define SIMT_INLINE inline __attribute__((always_inline))

namespace simt {

template <class T>
SIMT_INLINE void check_alignment(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T))
    fail("a misaligned access of " + std::to_string(sizeof(T)) + " bytes");
}

// Brackets an access that other blocks may make at the same time; checks its alignment.
enum class Coherent { load, update };
void coherent_begin(Coherent kind, const void* p, size_t bytes);
void coherent_end();

template <class T>
SIMT_INLINE T coherent_load(const T* p) {
  coherent_begin(Coherent::load, p, sizeof(T));
  T value = *p;
  coherent_end();
  return value;
}
// *p = f(*p) in one step; gives the old value.
template <class T, class F>
SIMT_INLINE T coherent_update(T* p, F f) {
  coherent_begin(Coherent::update, p, sizeof(T));
  T old = *p;
  *p = f(old);
  coherent_end();
  return old;
}

// The copy is made only when it is waited for; until then the destination holds NaN.
void async_copy(void* to, const void* from, size_t bytes, size_t zero_fill);
void async_commit();
void async_wait(size_t batches_left);

template <class T>
using Value = std::type_identity_t<T>;

}  // namespace simt

// ---- plain accesses with a hint for the caches
#define SIMT_LOAD(name)            \
  template <class T>               \
  SIMT_INLINE T name(const T* p) { \
    simt::check_alignment(p);      \
    return *p;                     \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldlu)
#undef SIMT_LOAD

#define SIMT_STORE(name)                              \
  template <class T>                                  \
  SIMT_INLINE void name(T* p, simt::Value<T> value) { \
    simt::check_alignment(p);                         \
    *p = value;                                       \
  }
SIMT_STORE(__stwb)
SIMT_STORE(__stcs)
SIMT_STORE(__stwt)
#undef SIMT_STORE

// ---- accesses that other blocks see: past the L1 caches, and atomics
template <class T>
SIMT_INLINE T __ldcg(const T* p) {
  return simt::coherent_load(p);
}
template <class T>
SIMT_INLINE void __stcg(T* p, simt::Value<T> value) {
  simt::coherent_update(p, [&](T) { return value; });
}

#define SIMT_ATOMIC(name, expression)                                      \
  template <class T>                                                       \
  SIMT_INLINE T name(T* p, simt::Value<T> v) {                             \
    return simt::coherent_update(p, [v](T old) { return T(expression); }); \
  }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicSub, old - v)
SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicAnd, old& v)
SIMT_ATOMIC(atomicOr, old | v)
SIMT_ATOMIC(atomicXor, old ^ v)
SIMT_ATOMIC(atomicExch, ((void)old, v))
SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef SIMT_ATOMIC
template <class T>
SIMT_INLINE T atomicCAS(T* p, simt::Value<T> expected, simt::Value<T> value) {
  return simt::coherent_update(p, [&](T old) { return old == expected ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// ---- cp.async, through the toolkit's C functions
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zero_fill = 0) {
  simt::async_copy(to, from, bytes, zero_fill);
}
inline void __pipeline_commit() { simt::async_commit(); }
inline void __pipeline_wait_prior(size_t batches) { simt::async_wait(batches); }
