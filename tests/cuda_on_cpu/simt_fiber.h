// A fiber: a stack of its own, and the switch between it and the stack of the host thread that steps it.
#pragma once
#include <cstddef>

#if defined(SIMT_UCONTEXT) || !defined(__x86_64__)
#define SIMT_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  void set_stack(char* lowest) { stack_ = lowest; }
  // Makes the next enter() begin `entry`, which must call begin() first and leave(finished) last. `color`
  // spreads the stacks of neighbours over the sets of the caches.
  void prepare(void (*entry)(), unsigned color);

  enum Leave { paused, finished, abandoned };
  void enter();           // host to fiber; returns when the fiber leaves
  static void begin();    // first of all on a new fiber
  void leave(Leave how);  // fiber to host; returns at the next enter() if paused, else never

 private:
  char* stack_ = nullptr;
  bool dirty_ = true;  // the stack still holds frames
#if defined(SIMT_USE_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_;
#endif
};

// Memory for the stacks of `count` fibers, with a guard page below each. Never moves or shrinks.
class Stacks {
 public:
  void reserve(size_t count);
  char* operator[](size_t i) const;

 private:
  char* memory_ = nullptr;
  size_t count_ = 0;
};

}  // namespace simt
