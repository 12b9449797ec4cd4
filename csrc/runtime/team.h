// A team of threads for one parallel region: torch's OpenMP threads, our own barrier, a range of chunks for each.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "runtime/tensor.h"

namespace llmopt {

// Barrier and chunks of one team. In a phase there is a range of the chunks for every thread that the program was
// planned for (first_chunk). A thread takes its own from the front, so that neighbours, and the same rows in one phase
// after the other, meet the caches of one core; who is through helps others. But with the first chunk of a range its
// own thread begins: what a kernel does once a thread it does there. The runtime may give fewer threads than were asked
// for: the ranges without one are shared. Spins a bounded time, then yields the core.
class Team {
 public:
  Team(int threads, int ranges)
      : threads_(threads), num_ranges_(ranges), ranges_(new Range[static_cast<size_t>(ranges)]) {}
  // The chunk a thread runs after `last`, or after none (-1); `chunks` when all are taken. Phases count from 1.
  int64_t next_chunk(int thread, uint32_t phase, int64_t chunks, int64_t last) {
    const int64_t first = first_chunk(chunks, num_ranges_, thread);
    if (last < 0 && first < first_chunk(chunks, num_ranges_, thread + 1)) return first;
    const int seen = threads_ < num_ranges_ || num_ranges_ < kMostHelped ? num_ranges_ : kMostHelped;
    for (int i = 0; i < seen; ++i) {
      const int owner = thread + i < num_ranges_ ? thread + i : thread + i - num_ranges_;
      const int64_t chunk = take(owner, phase, chunks);
      if (chunk < chunks) return chunk;
    }
    return chunks;
  }
  // Returns when all threads have come; a thread that has to wait asks for a Span of memory and fetches it meanwhile.
  template <class F>
  void barrier(F wanted) {
    uint32_t generation;
    if (!arrive(&generation)) wait(generation, wanted());
  }

 private:
  static constexpr int kMostHelped = 8;  // looking at a range costs a cache line of another core

  // How many chunks of a range were taken, and in which phase: one of an earlier phase means none but what its own
  // thread begins with.
  struct alignas(128) Range {
    std::atomic<uint64_t> taken{0};
  };

  int64_t take(int owner, uint32_t phase, int64_t chunks);
  // True for the last thread to come, which lets the others go.
  bool arrive(uint32_t* generation);
  void wait(uint32_t generation, Span wanted);

  const int threads_, num_ranges_;
  const std::unique_ptr<Range[]> ranges_;
  alignas(128) std::atomic<int> arrived_{0};
  alignas(128) std::atomic<uint32_t> generation_{0};
};

// Runs body(team, thread_index) on `threads` threads of the OpenMP pool that torch uses too; on one thread when called
// from inside a parallel region.
void parallel(int threads, void (*body)(Team&, int, void*), void* context);

}  // namespace llmopt
