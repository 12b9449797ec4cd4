// Sampled content of memory ranges: cheap evidence that a weight was edited where no version counter shows it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace llmopt {

class Samples {
 public:
  // Keeps kLines cache lines of each range, spread evenly with its first and last line among them. The ranges must stay
  // readable for as long as digest() is called.
  Samples(std::vector<int64_t> addresses, const std::vector<int64_t>& bytes) {
    if (addresses.size() != bytes.size()) throw std::invalid_argument("Samples needs as many sizes as addresses");
    for (size_t i = 0; i < addresses.size(); ++i)
      for (int line = 0; line < kLines; ++line) {
        const int64_t room = bytes[i] - kLineBytes;
        if (room <= 0) {
          if (line == 0 && bytes[i] > 0) lines_.push_back({addresses[i], bytes[i]});
          continue;
        }
        lines_.push_back({addresses[i] + room * line / (kLines - 1) / 8 * 8, kLineBytes});
      }
  }

  // Order and position count; equal content gives equal digests.
  uint64_t digest() const {
    constexpr size_t kAhead = 24;  // lines in flight: the reads miss every cache, so they must overlap
    uint64_t h = 0x9E3779B97F4A7C15u;
    for (size_t i = 0; i < lines_.size(); ++i) {
      if (i + kAhead < lines_.size()) __builtin_prefetch(reinterpret_cast<const void*>(lines_[i + kAhead].first));
      const char* p = reinterpret_cast<const char*>(lines_[i].first);
      for (int64_t offset = 0; offset < lines_[i].second; offset += 8) {
        uint64_t word = 0;
        const int64_t left = lines_[i].second - offset;
        std::memcpy(&word, p + offset, left < 8 ? static_cast<size_t>(left) : 8);
        h = (h ^ word) * 0xFF51AFD7ED558CCDu;
        h ^= h >> 32;
      }
    }
    return h;
  }

 private:
  static constexpr int kLines = 4;
  static constexpr int64_t kLineBytes = 64;
  std::vector<std::pair<int64_t, int64_t>> lines_;
};

}  // namespace llmopt
