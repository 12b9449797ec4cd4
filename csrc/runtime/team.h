// A team of threads for one parallel region: torch's OpenMP threads, our own barrier, dynamic chunks.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "runtime/tensor.h"

namespace llmopt {

// Barrier and chunks of one team. In a phase every thread has a range of the chunks (first_chunk) and takes them from
// the front, so that neighbours, and the same rows in one phase after the other, meet the caches of one core. Who is
// through helps others, but for their first chunk, with which each thread begins: what a kernel does once a thread it
// does there. Spins a bounded time, then yields the core.
class Team {
 public:
  explicit Team(int threads) : threads_(threads), ranges_(new Range[static_cast<size_t>(threads)]) {}
  int threads() const { return threads_; }
  // The chunk a thread runs after `last`, or after none (-1); `chunks` when all are taken. Phases count from 1.
  int64_t next_chunk(int thread, uint32_t phase, int64_t chunks, int64_t last) {
    const int64_t first = first_chunk(chunks, threads_, thread);
    if (last < 0 && first < first_chunk(chunks, threads_, thread + 1)) return first;
    const int helped = threads_ < kMostHelped ? threads_ : kMostHelped;
    for (int i = 0; i < helped; ++i) {
      const int64_t chunk = take(thread + i < threads_ ? thread + i : thread + i - threads_, phase, chunks);
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

  // How many chunks of a range were taken, and in which phase: one of an earlier phase means none but the first.
  struct alignas(128) Range {
    std::atomic<uint64_t> taken{0};
  };

  int64_t take(int owner, uint32_t phase, int64_t chunks);
  // True for the last thread to come, which lets the others go.
  bool arrive(uint32_t* generation);
  void wait(uint32_t generation, Span wanted);

  const int threads_;
  const std::unique_ptr<Range[]> ranges_;
  alignas(128) std::atomic<int> arrived_{0};
  alignas(128) std::atomic<uint32_t> generation_{0};
};

// Runs body(team, thread_index) on `threads` threads of the OpenMP pool that torch uses too; on one thread when called
// from inside a parallel region.
void parallel(int threads, void (*body)(Team&, int, void*), void* context);

}  // namespace llmopt
