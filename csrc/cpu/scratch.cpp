#include "scratch.h"

#include <cstdlib>
#include <new>

namespace fastloss::cpu {
namespace {

struct Buffer {
  void* p = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(p); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  static thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    std::free(buffer.p);
    buffer.bytes = (bytes + 4095) / 4096 * 4096;
    buffer.p = std::aligned_alloc(64, buffer.bytes);
    if (!buffer.p) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.p;
}

}  // namespace fastloss::cpu
