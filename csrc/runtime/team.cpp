#include "runtime/team.h"

#include <omp.h>
#include <sched.h>

#include <memory>

namespace llmopt {
namespace {

// A few microseconds of spinning: two orders above a hand-over between running cores, well below a time slice.
constexpr int kSpins = 2000;
constexpr int64_t kLineBytes = 64;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

int64_t Team::take(int owner, uint32_t phase, int64_t chunks) {
  const int64_t first = first_chunk(chunks, num_ranges_, owner);
  const int64_t length = first_chunk(chunks, num_ranges_, owner + 1) - first, begun = owner < threads_ ? 1 : 0;
  std::atomic<uint64_t>& taken = ranges_[static_cast<size_t>(owner)].taken;
  for (uint64_t seen = taken.load(std::memory_order_relaxed);;) {
    const int64_t count = seen >> 32 == phase ? static_cast<int64_t>(seen & UINT32_MAX) : begun;
    if (count >= length) return chunks;
    const uint64_t next = uint64_t{phase} << 32 | static_cast<uint64_t>(count + 1);
    if (taken.compare_exchange_weak(seen, next, std::memory_order_relaxed)) return first + count;
  }
}

bool Team::arrive(uint32_t* generation) {
  if (threads_ == 1) return true;
  *generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) != threads_ - 1) return false;
  arrived_.store(0, std::memory_order_relaxed);
  generation_.store(*generation + 1, std::memory_order_release);
  return true;
}

void Team::wait(uint32_t generation, Span wanted) {
  const auto waits = [&] { return generation_.load(std::memory_order_acquire) == generation; };
  for (; wanted.bytes > 0 && waits(); wanted.bytes -= kLineBytes) {
    __builtin_prefetch(wanted.data, 0, 2);
    wanted.data += kLineBytes;
  }
  for (int spins = 0; waits(); ++spins) {
    if (spins < kSpins)
      relax();
    else
      sched_yield();
  }
}

void parallel(int threads, void (*body)(Team&, int, void*), void* context) {
  if (threads <= 1 || omp_in_parallel()) {
    Team team(1, threads < 1 ? 1 : threads);
    body(team, 0, context);
    return;
  }
  // The runtime may give fewer threads than asked for; the barrier must count those that came.
  std::unique_ptr<Team> team;
#pragma omp parallel num_threads(threads)
  {
#pragma omp master
    team = std::make_unique<Team>(omp_get_num_threads(), threads);
#pragma omp barrier
    body(*team, omp_get_thread_num(), context);
  }
}

}  // namespace llmopt
