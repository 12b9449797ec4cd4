// Content of memory ranges: evidence that a weight was edited where no version counter shows it. Samples show at once
// what changed everywhere; windows, one after the other, show in time what changed anywhere.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace llmopt {

struct Range {
  int64_t address, bytes;
};

class Samples {
 public:
  // Remembers kLines cache lines of each range, spread evenly with the first and the last among them. The ranges must
  // stay readable for as long as unchanged() is called.
  Samples(const std::vector<int64_t>& addresses, const std::vector<int64_t>& bytes);

  // Asks for the memory that unchanged() looks at next, without waiting for it.
  void fetch() const;

  // Looks at one line of every range, another one than the call before; false when any differs from what it was.
  bool unchanged();

 private:
  static constexpr int kLines = 16;

  uint64_t digest(int line) const;

  std::vector<Range> lines_[kLines];  // per turn: one in every range
  uint64_t digests_[kLines] = {};
  std::atomic<uint32_t> turn_{0};
};

class Content {
 public:
  // Remembers a digest of every window of kWindowBytes or less. The ranges must stay readable for as long as somebody
  // asks.
  Content(const std::vector<int64_t>& addresses, const std::vector<int64_t>& bytes);

  size_t windows() const { return windows_.size(); }
  bool unchanged(size_t window) const;
  bool all_unchanged() const;

 private:
  static constexpr int64_t kWindowBytes = 32 << 10;  // five microseconds to read

  std::vector<Range> windows_;
  std::vector<uint64_t> digests_;
};

// A way through all windows of several contents.
class Sweep {
 public:
  explicit Sweep(std::vector<std::shared_ptr<const Content>> contents);

  // Looks at one window, the one after that of the call before; false when it is not what it was.
  bool unchanged();

 private:
  std::vector<std::shared_ptr<const Content>> contents_;
  std::vector<uint64_t> ends_;  // windows of the contents up to each
  std::atomic<uint64_t> turn_{0};
};

}  // namespace llmopt
