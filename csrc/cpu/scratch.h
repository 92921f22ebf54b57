// Scratch memory of a thread, reused from call to call, so that no kernel pays for fresh pages.
#pragma once
#include <cstddef>

namespace fastloss::cpu {

// At least `bytes`, 64-byte aligned, contents undefined; valid until the thread's next call.
void* thread_scratch(size_t bytes);

}  // namespace fastloss::cpu
