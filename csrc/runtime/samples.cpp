#include "runtime/samples.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace llmopt {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr size_t kAhead = 32;  // lines in flight: the reads miss every cache, so they must overlap
constexpr uint64_t kSeed = 0x9E3779B97F4A7C15u;

inline uint64_t mix(uint64_t h, uint64_t word) {
  h = (h ^ word) * 0xFF51AFD7ED558CCDu;
  return h ^ h >> 32;
}

uint64_t mix_bytes(uint64_t h, const char* p, int64_t bytes) {
  for (; bytes > 0; bytes -= 8, p += 8) {
    uint64_t word = 0;
    std::memcpy(&word, p, bytes < 8 ? static_cast<size_t>(bytes) : 8);
    h = mix(h, word);
  }
  return h;
}

// As many chains side by side as words in a line: one would wait for its own multiplications.
uint64_t digest_of(const Range& range) {
  constexpr int kChains = kLineBytes / 8;
  uint64_t chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = kSeed + static_cast<uint64_t>(i);
  const char* p = reinterpret_cast<const char*>(range.address);
  int64_t left = range.bytes;
  for (; left >= kLineBytes; left -= kLineBytes, p += kLineBytes)
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
      uint64_t word;
      std::memcpy(&word, p + 8 * i, 8);
      chain[i] = mix(chain[i], word);
    }
  uint64_t h = mix_bytes(kSeed, p, left);
  for (uint64_t c : chain) h = mix(h, c);
  return h;
}

void need_sizes(const std::vector<int64_t>& addresses, const std::vector<int64_t>& bytes) {
  if (addresses.size() != bytes.size())
    throw std::invalid_argument("each address needs a size: there must be as many sizes");
}

}  // namespace

Samples::Samples(const std::vector<int64_t>& addresses, const std::vector<int64_t>& bytes) {
  need_sizes(addresses, bytes);
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
  for (const Range& line : lines_[turn_.load(std::memory_order_relaxed) % kLines])
    __builtin_prefetch(reinterpret_cast<const void*>(line.address));
}

bool Samples::unchanged() {
  const int line = static_cast<int>(turn_.fetch_add(1, std::memory_order_relaxed) % kLines);
  return digest(line) == digests_[line];
}

uint64_t Samples::digest(int line) const {
  const auto& rows = lines_[line];
  uint64_t h = kSeed;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i + kAhead < rows.size()) __builtin_prefetch(reinterpret_cast<const void*>(rows[i + kAhead].address));
    h = mix_bytes(h, reinterpret_cast<const char*>(rows[i].address), rows[i].bytes);
  }
  return h;
}

Content::Content(const std::vector<int64_t>& addresses, const std::vector<int64_t>& bytes) {
  need_sizes(addresses, bytes);
  for (size_t i = 0; i < addresses.size(); ++i)
    for (int64_t at = 0; at < bytes[i]; at += kWindowBytes) {
      windows_.push_back({addresses[i] + at, std::min(kWindowBytes, bytes[i] - at)});
      digests_.push_back(digest_of(windows_.back()));
    }
}

bool Content::unchanged(size_t window) const { return digest_of(windows_.at(window)) == digests_[window]; }

bool Content::all_unchanged() const {
  for (size_t i = 0; i < windows_.size(); ++i)
    if (!unchanged(i)) return false;
  return true;
}

Sweep::Sweep(std::vector<std::shared_ptr<const Content>> contents) : contents_(std::move(contents)) {
  uint64_t end = 0;
  for (const auto& content : contents_) ends_.push_back(end += content->windows());
}

bool Sweep::unchanged() {
  if (ends_.empty() || ends_.back() == 0) return true;
  const uint64_t turn = turn_.fetch_add(1, std::memory_order_relaxed) % ends_.back();
  const auto i = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), turn) - ends_.begin());
  return contents_[i]->unchanged(turn - (i ? ends_[i - 1] : 0));
}

}  // namespace llmopt
