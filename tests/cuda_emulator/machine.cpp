// Fibers, the scheduler, barriers and warp collectives.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

// Saves the callee-saved registers and the stack pointer of one fiber and continues another (x86-64, System V).
extern "C" void emulator_switch(void** save, void* load);
asm(R"(.text
.type emulator_switch,@function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // of which the lowest page is a guard

enum State { kReady, kAtBarrier, kInCollective, kEnded };

struct Thread {
  void* stack_pointer;
  State state;
  Dim3 index;
};

struct Warp {
  Collective kind;
  uint32_t mask, arrived;
  const void* in[32];
  void* out[32];
};

struct Machine {
  std::vector<char*> stacks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> ready;
  Position position;
  int current = 0;
  int at_barrier = 0, ended = 0;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  void* scheduler = nullptr;  // its stack pointer while a fiber runs
  void (*kernel)(const void*) = nullptr;
  const void* params = nullptr;
  std::minstd_rand random;
  bool failed = false;
  std::string message;
  Counters counters{};
};
Machine machine;

const char* const kCollectives[] = {"__syncwarp", "__shfl_xor_sync", "ldmatrix", "mma"};

void pause(State state) {
  Thread& me = machine.threads[machine.current];
  me.state = state;
  emulator_switch(&me.stack_pointer, machine.scheduler);
}

void wake(int thread) {
  machine.threads[thread].state = kReady;
  machine.ready.push_back(thread);
}

void run_thread() {
  machine.kernel(machine.params);
  memory::thread_ended();
  ++machine.ended;
  pause(kEnded);
  abort();  // an ended thread is never continued
}

// What the stuck threads wait for.
void describe_deadlock() {
  std::string text;
  char line[256];
  const int threads = static_cast<int>(machine.threads.size());
  if (machine.at_barrier) {
    snprintf(line, sizeof line, "divergent barrier: %d of %d threads wait at %s:%d, %d have left the kernel",
             machine.at_barrier, threads, machine.barrier_file, machine.barrier_line, machine.ended);
    text += line;
  }
  for (size_t w = 0; w < machine.warps.size(); ++w) {
    const Warp& warp = machine.warps[w];
    if (!warp.arrived) continue;
    snprintf(line, sizeof line, "%spartial collective: %s of warp %zu with mask %08x misses lanes %08x",
             text.empty() ? "" : "; ", kCollectives[warp.kind], w, warp.mask, warp.mask & ~warp.arrived);
    text += line;
  }
  machine.failed = true;
  machine.message = text;
}

void run_block(unsigned count) {
  machine.threads.assign(count, {});
  machine.warps.assign((count + 31) / 32, {});
  machine.ready.clear();
  machine.at_barrier = machine.ended = 0;
  const Dim3 dim = machine.position.block_dim;
  for (unsigned i = 0; i < count; ++i) {
    // An aligned end of the stack, a return address that is never used, run_thread, six registers.
    void** top = reinterpret_cast<void**>(machine.stacks[i] + kStackBytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&run_thread);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    machine.threads[i] = {top, kReady, {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y}};
    machine.ready.push_back(static_cast<int>(i));
  }
  memory::begin_block(static_cast<int>(count));
  while (!machine.failed && machine.ended < static_cast<int>(count)) {
    if (machine.ready.empty()) return describe_deadlock();
    const size_t pick = machine.random() % machine.ready.size();
    machine.current = machine.ready[pick];
    machine.ready[pick] = machine.ready.back();
    machine.ready.pop_back();
    machine.position.thread = machine.threads[machine.current].index;
    emulator_switch(&machine.scheduler, machine.threads[machine.current].stack_pointer);
  }
  if (!machine.failed) memory::end_block();
  ++machine.counters.blocks;
}

}  // namespace

const Position& position() { return machine.position; }
int linear_thread() { return machine.current; }

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[96];
  const Dim3 b = machine.position.block;
  snprintf(where, sizeof where, " (thread %d of block %u,%u,%u)", machine.current, b.x, b.y, b.z);
  machine.failed = true;
  machine.message = std::string(text) + where;
  emulator_switch(&machine.threads[machine.current].stack_pointer, machine.scheduler);
  abort();
}

void barrier(const char* file, int line) {
  if (machine.at_barrier == 0) {
    machine.barrier_file = file;
    machine.barrier_line = line;
  } else if (line != machine.barrier_line || strcmp(file, machine.barrier_file) != 0) {
    fail("divergent barrier: some threads wait at %s:%d, others at %s:%d", machine.barrier_file, machine.barrier_line,
         file, line);
  }
  if (++machine.at_barrier < static_cast<int>(machine.threads.size())) return pause(kAtBarrier);
  machine.at_barrier = 0;
  memory::barrier_passed();
  for (int i = 0; i < static_cast<int>(machine.threads.size()); ++i)
    if (machine.threads[i].state == kAtBarrier) wake(i);
}

void collective(Collective kind, uint32_t mask, const void* in, void* out,
                void (*apply)(const void* const*, void* const*, uint32_t)) {
  const int lane = machine.current % 32;
  Warp& warp = machine.warps[machine.current / 32];
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask %08x", kCollectives[kind], lane, mask);
  if (warp.arrived && (warp.kind != kind || warp.mask != mask))
    fail("partial collective: lanes %08x are in %s with mask %08x, lane %d in %s with mask %08x", warp.arrived,
         kCollectives[warp.kind], warp.mask, lane, kCollectives[kind], mask);
  warp.kind = kind;
  warp.mask = mask;
  warp.in[lane] = in;
  warp.out[lane] = out;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) return pause(kInCollective);
  apply(warp.in, warp.out, mask);
  warp.arrived = 0;
  if (kind == kSyncWarp) memory::warp_synchronised(machine.current / 32);
  const int first = machine.current / 32 * 32;
  for (int l = 0; l < 32; ++l)
    if (l != lane && mask >> l & 1) wake(first + l);
}

const char* launch(void (*kernel)(const void*), const void* params, Dim3 grid, Dim3 block, size_t shared_bytes) {
  const unsigned count = block.x * block.y * block.z;
  while (machine.stacks.size() < count) {
    char* stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE)) abort();
    machine.stacks.push_back(stack);
  }
  machine.kernel = kernel;
  machine.params = params;
  machine.failed = false;
  machine.message.clear();
  machine.position.block_dim = block;
  machine.position.grid_dim = grid;
  ++machine.counters.launches;
  memory::begin_launch(shared_bytes);
  std::vector<Dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
  std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (const Dim3& b : blocks) {
    machine.position.block = b;
    run_block(count);
    if (machine.failed) break;
  }
  return machine.message.c_str();
}

}  // namespace emulator

extern "C" {
void emulator_seed(unsigned seed) { emulator::machine.random.seed(seed + 1); }
const char* emulator_message() { return emulator::machine.message.c_str(); }
emulator::Counters* emulator_counters() { return &emulator::machine.counters; }
}
