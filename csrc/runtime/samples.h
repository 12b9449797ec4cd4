// Sampled content of memory ranges: cheap evidence that a weight was edited where no version counter shows it.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace llmopt {

class Samples {
 public:
  // Remembers kLines cache lines of each range, spread evenly with the first and the last among them. The ranges must
  // stay readable for as long as unchanged() is called.
  Samples(const std::vector<int64_t>& addresses, const std::vector<int64_t>& bytes) {
    if (addresses.size() != bytes.size()) throw std::invalid_argument("Samples needs as many sizes as addresses");
    for (int line = 0; line < kLines; ++line) {
      for (size_t i = 0; i < addresses.size(); ++i) {
        const int64_t room = bytes[i] > kLineBytes ? bytes[i] - kLineBytes : 0;
        const int64_t length = bytes[i] < kLineBytes ? bytes[i] : kLineBytes;
        const int64_t aligned = (addresses[i] + room * line / (kLines - 1)) & -kLineBytes;
        lines_[line].push_back({aligned < addresses[i] ? addresses[i] : aligned, length});
      }
      digests_[line] = digest(line);
    }
  }

  // Looks at one line of every range, another one than the call before; false when any differs from what it was.
  bool unchanged() {
    const int line = static_cast<int>(turn_.fetch_add(1, std::memory_order_relaxed) % kLines);
    return digest(line) == digests_[line];
  }

 private:
  static constexpr int kLines = 16;
  static constexpr int64_t kLineBytes = 64;
  static constexpr size_t kAhead = 32;  // lines in flight: the reads miss every cache, so they must overlap

  uint64_t digest(int line) const {
    const auto& rows = lines_[line];
    uint64_t h = 0x9E3779B97F4A7C15u;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (i + kAhead < rows.size()) __builtin_prefetch(reinterpret_cast<const void*>(rows[i + kAhead].first));
      const char* p = reinterpret_cast<const char*>(rows[i].first);
      for (int64_t offset = 0; offset < rows[i].second; offset += 8) {
        uint64_t word = 0;
        const int64_t left = rows[i].second - offset;
        std::memcpy(&word, p + offset, left < 8 ? static_cast<size_t>(left) : 8);
        h = (h ^ word) * 0xFF51AFD7ED558CCDu;
        h ^= h >> 32;
      }
    }
    return h;
  }

  std::vector<std::pair<int64_t, int64_t>> lines_[kLines];  // per turn: (address, bytes) in every range
  uint64_t digests_[kLines] = {};
  std::atomic<uint32_t> turn_{0};
};

}  // namespace llmopt
