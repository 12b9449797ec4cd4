// Page-aligned memory for packed weights, arenas and scratch.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace llmopt {

// Owns zeroed memory: 64-byte aligned; when large, pages of its own (given back at once when freed), 2 MiB-aligned,
// with huge pages asked for where whole ones fit.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) { reset(bytes); }
  ~Memory() { release(); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Grows to at least `bytes`; the content is lost when it does.
  void reserve(size_t bytes) {
    if (bytes > bytes_) reset(bytes + bytes / 4);
  }

 private:
  static constexpr size_t kSmall = size_t{4} << 10, kHuge = size_t{2} << 20;

  static size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

  void release() {
    if (mapped_)
      munmap(mapped_, mapped_bytes_);
    else
      std::free(data_);
    mapped_ = nullptr;
    data_ = nullptr;
    bytes_ = 0;
  }

  void reset(size_t bytes) {
    release();
    if (bytes == 0) return;
    if (bytes >= kHuge) {
      map(round_up(bytes, kSmall));
      return;
    }
    const size_t rounded = round_up(bytes, 64);
    void* p = std::aligned_alloc(64, rounded);
    if (!p) throw std::bad_alloc();
    __builtin_memset(p, 0, rounded);
    data_ = static_cast<char*>(p);
    bytes_ = rounded;
  }

  // Maps one huge page more than needed, so that an aligned start fits; the untouched ends cost no memory. The last
  // huge page would be touched in part and cost all of it: there, pages are small even where the system gives huge ones
  // to everybody.
  void map(size_t bytes) {
    void* p = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mapped_ = p;
    mapped_bytes_ = bytes + kHuge;
    data_ = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(p), kHuge));
    bytes_ = bytes;
    const size_t whole = bytes / kHuge * kHuge;
    madvise(data_, whole, MADV_HUGEPAGE);
    madvise(data_ + whole, bytes - whole, MADV_NOHUGEPAGE);
  }

  char* data_ = nullptr;
  size_t bytes_ = 0;
  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
};

}  // namespace llmopt
