// Memory that is reused by the next call, on large pages if the system has them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "sparse.h"

namespace {

class Memory {
 public:
  explicit Memory(int64_t bytes) : size(round_up(bytes, PAGE)), start(allocated(size), std::free) {}
  char *get() const { return start.get(); }
  int64_t bytes() const { return size; }

 private:
  static constexpr int64_t PAGE = 1 << 21;
  int64_t size;
  std::unique_ptr<char, decltype(&std::free)> start;

  static char *allocated(int64_t size) {
    char *made = static_cast<char *>(std::aligned_alloc(PAGE, size));
    if (!made) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(made, size, MADV_HUGEPAGE);
#endif
    std::memset(made, 0, size);
    return made;
  }
};

// Pieces that no thread is using; pieces that are too small for the current images are freed.
class Pool {
 public:
  Memory take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      while (!free.empty()) {
        Memory found = std::move(free.back());
        free.pop_back();
        if (found.bytes() >= bytes) return found;
      }
    }
    return Memory(bytes);
  }
  void give_back(Memory memory) {
    const std::lock_guard<std::mutex> lock(mutex);
    free.push_back(std::move(memory));
  }

 private:
  std::mutex mutex;
  std::vector<Memory> free;
};

}  // namespace
