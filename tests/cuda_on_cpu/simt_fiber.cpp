#include "simt_fiber.h"

#include <sys/mman.h>

#include <new>

#include "simt_race.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#endif

namespace simt {
namespace {

constexpr size_t kGuardBytes = 4096, kStride = Fiber::kStackBytes + kGuardBytes;
// How much of the top of a stack entry() itself may have left poisoned by AddressSanitizer.
[[maybe_unused]] constexpr size_t kEntryBytes = 20 << 10;

// The host's side of the switch. One host thread runs kernels at a time.
#if defined(SIMT_USE_UCONTEXT)
ucontext_t host_context;
#else
void* host_stack_pointer;

// Saves the callee-saved registers on this stack and its top in *from, and goes on where `to` was saved.
__attribute__((naked, noinline)) void switch_stack([[maybe_unused]] void** from, [[maybe_unused]] void* to) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif
#if defined(SIMT_ASAN)
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
#endif

}  // namespace

void Fiber::prepare(void (*entry)(), unsigned color) {
#if defined(SIMT_ASAN)
  if (dirty_) {
    ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
  } else {
    ASAN_UNPOISON_MEMORY_REGION(stack_ + kStackBytes - kEntryBytes, kEntryBytes);
  }
#endif
  dirty_ = true;
#if defined(SIMT_USE_UCONTEXT)
  (void)color;
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  auto* top = reinterpret_cast<void**>(stack_ + kStackBytes - 64 - color * 576 % 16384);
  *--top = nullptr;  // where entry would return to; it never does
  *--top = reinterpret_cast<void*>(entry);
  for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
  stack_pointer_ = top;
#endif
}

void Fiber::enter() {
  race::stack_low = stack_;
  race::stack_high = stack_ + kStackBytes;
#if defined(SIMT_ASAN)
  void* host_fake_stack;
  __sanitizer_start_switch_fiber(&host_fake_stack, stack_, kStackBytes);
#endif
#if defined(SIMT_USE_UCONTEXT)
  swapcontext(&host_context, &context_);
#else
  switch_stack(&host_stack_pointer, stack_pointer_);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::begin() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  race::in_kernel = true;
}

void Fiber::leave(Leave how) {
  race::in_kernel = false;
  dirty_ = how != finished;
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(how == paused ? &fake_stack : nullptr, host_stack, host_stack_bytes);
#endif
#if defined(SIMT_USE_UCONTEXT)
  swapcontext(&context_, &host_context);
#else
  switch_stack(&stack_pointer_, host_stack_pointer);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, &host_stack, &host_stack_bytes);
#endif
  race::in_kernel = true;
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
#if defined(SIMT_ASAN)
  if (memory_) ASAN_UNPOISON_MEMORY_REGION(memory_, count_ * kStride);  // whoever maps these pages next
#endif
  if (memory_) munmap(memory_, count_ * kStride);
  void* memory = mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * kStride, kGuardBytes, PROT_NONE);
  count_ = count;
}

char* Stacks::operator[](size_t i) const { return memory_ + i * kStride + kGuardBytes; }

}  // namespace simt
