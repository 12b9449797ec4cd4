// Sampled content of memory ranges: cheap evidence that a weight was edited where no version counter shows it.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace llmopt {

class Samples {
 public:
  // Remembers kLines cache lines of each range, spread evenly with the first and the last among them. The ranges must
  // stay readable for as long as unchanged() is called.
  Samples(const std::vector<int64_t>& addresses, const std::vector<int64_t>& bytes);

  // Asks for the memory that unchanged() looks at next, without waiting for it.
  void fetch() const;

  // Looks at one line of every range, another one than the call before; false when any differs from what it was.
  bool unchanged();

  // Looks at all lines of every range.
  bool all_unchanged() const;

 private:
  static constexpr int kLines = 16;

  uint64_t digest(int line) const;

  std::vector<std::pair<int64_t, int64_t>> lines_[kLines];  // per turn: (address, bytes) in every range
  uint64_t digests_[kLines] = {};
  std::atomic<uint32_t> turn_{0};
};

}  // namespace llmopt
