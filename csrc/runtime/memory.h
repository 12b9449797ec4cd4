// Page-aligned memory for packed weights, arenas and scratch.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace llmopt {

// Owns zeroed memory: 2 MiB-aligned with huge pages asked for when it is large, 64-byte aligned otherwise.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) { reset(bytes); }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Grows to at least `bytes`; the content is lost when it does.
  void reserve(size_t bytes) {
    if (bytes > bytes_) reset(bytes + bytes / 4);
  }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;

  void reset(size_t bytes) {
    std::free(data_);
    data_ = nullptr;
    bytes_ = 0;
    const size_t alignment = bytes >= kHuge ? kHuge : 64;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    if (rounded == 0) return;
    void* p = std::aligned_alloc(alignment, rounded);
    if (!p) throw std::bad_alloc();
    if (alignment == kHuge) madvise(p, rounded, MADV_HUGEPAGE);
    data_ = static_cast<char*>(p);
    bytes_ = rounded;
    __builtin_memset(data_, 0, rounded);
  }

  char* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace llmopt
