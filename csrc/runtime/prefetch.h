// Memory that somebody will soon read: asked for without waiting for it.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace llmopt {

class Prefetch {
 public:
  // The ranges need not be readable: a prefetch of what is not there does nothing.
  Prefetch(const std::vector<int64_t>& addresses, const std::vector<int64_t>& bytes) {
    if (addresses.size() != bytes.size()) throw std::invalid_argument("Prefetch needs as many sizes as addresses");
    for (size_t i = 0; i < addresses.size(); ++i)
      for (int64_t at = addresses[i] & -kLineBytes; at < addresses[i] + bytes[i]; at += kLineBytes)
        lines_.push_back(at);
  }

  void fetch() const {
    for (int64_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  std::vector<int64_t> lines_;
};

}  // namespace llmopt
