// A team of threads for one parallel region: torch's OpenMP threads, our own barrier, dynamic chunks.
#pragma once
#include <atomic>
#include <cstdint>

#include "runtime/tensor.h"

namespace llmopt {

// Barrier and chunk counter of one team. Thread t begins a phase with chunk t and then takes next_chunk(). The last
// thread to arrive resets the counter, so that a phase costs one barrier and no other synchronisation. Spins a bounded
// time, then yields the core.
class Team {
 public:
  explicit Team(int threads) : threads_(threads), chunk_solo_(1), chunk_(threads) {}
  int threads() const { return threads_; }
  int64_t next_chunk() { return threads_ == 1 ? chunk_solo_++ : chunk_.fetch_add(1, std::memory_order_relaxed); }
  // Returns when all threads have come; a thread that has to wait asks for a Span of memory and fetches it meanwhile.
  template <class F>
  void barrier(F wanted) {
    uint32_t generation;
    if (!arrive(&generation)) wait(generation, wanted());
  }

 private:
  // True for the last thread to come, which lets the others go.
  bool arrive(uint32_t* generation);
  void wait(uint32_t generation, Span wanted);

  const int threads_;
  int64_t chunk_solo_;
  alignas(128) std::atomic<int64_t> chunk_;
  alignas(128) std::atomic<int> arrived_{0};
  alignas(128) std::atomic<uint32_t> generation_{0};
};

// Runs body(team, thread_index) on `threads` threads of the OpenMP pool that torch uses too; on one thread when called
// from inside a parallel region.
void parallel(int threads, void (*body)(Team&, int, void*), void* context);

}  // namespace llmopt
