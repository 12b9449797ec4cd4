#include "runtime/samples.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace llmopt {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr size_t kAhead = 32;  // lines in flight: the reads miss every cache, so they must overlap

}  // namespace

Samples::Samples(const std::vector<int64_t>& addresses, const std::vector<int64_t>& bytes) {
  if (addresses.size() != bytes.size()) throw std::invalid_argument("Samples needs as many sizes as addresses");
  for (int line = 0; line < kLines; ++line) {
    for (size_t i = 0; i < addresses.size(); ++i) {
      const int64_t room = bytes[i] > kLineBytes ? bytes[i] - kLineBytes : 0;
      const int64_t length = bytes[i] < kLineBytes ? bytes[i] : kLineBytes;
      const int64_t at = addresses[i] + room * line / (kLines - 1);
      // Aligned, so that it is one line of the cache; but the last one ends where the range ends.
      const int64_t aligned = line == kLines - 1 ? at : std::max(at & -kLineBytes, addresses[i]);
      lines_[line].push_back({aligned, length});
    }
    digests_[line] = digest(line);
  }
}

void Samples::fetch() const {
  for (const auto& [address, bytes] : lines_[turn_.load(std::memory_order_relaxed) % kLines])
    __builtin_prefetch(reinterpret_cast<const void*>(address));
}

bool Samples::unchanged() {
  const int line = static_cast<int>(turn_.fetch_add(1, std::memory_order_relaxed) % kLines);
  return digest(line) == digests_[line];
}

bool Samples::all_unchanged() const {
  for (int line = 0; line < kLines; ++line)
    if (digest(line) != digests_[line]) return false;
  return true;
}

uint64_t Samples::digest(int line) const {
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

}  // namespace llmopt
