// A CUDA device on the host, strict where hardware is lenient: one fiber per CUDA thread, blocks one after another,
// both in an order that a seed decides. The first mistake of a kernel ends its launch with a message.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

struct Dim3 {
  unsigned x, y, z;
};

// Where the running thread is: what threadIdx, blockIdx, blockDim and gridDim mean.
struct Position {
  Dim3 thread, block, block_dim, grid_dim;
};
const Position& position();
int linear_thread();

// Ends the launch with this message; the threads are abandoned where they are.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads: of all threads of the block, at the same line.
void barrier(const char* file, int line);

enum Collective { kSyncWarp, kShuffle, kLoadMatrices, kMultiply };

// Called by every lane named in mask. The last one runs apply(in, out, mask) over all lanes' operands, by lane.
void collective(Collective kind, uint32_t mask, const void* in, void* out,
                void (*apply)(const void* const* in, void* const* out, uint32_t mask));

// Checked accesses. Shared memory is [begin, begin + size) of this launch; global memory is what was registered.
unsigned char* shared_memory();
void read_shared(void* to, const void* from, int bytes);
void write_shared(void* to, const void* from, int bytes);
enum GlobalAccess { kReadOnly, kFresh, kWrite };  // kReadOnly: the path of memory that no thread of the launch writes
void access_global(const void* address, int bytes, GlobalAccess kind);
// __threadfence, and an atomic: by which other blocks learn of this block's writes, so that they must be fenced.
void fence();
void access_atomic(void* address, int bytes);
void copy_async(void* shared, const void* global, int bytes);
void commit_async();
void wait_async(int pending);

// How the accesses of warps fell together, when counting is on: wavefronts are passes over the banks of shared memory,
// sectors are 32 bytes of global memory; ideal is the least for the same bytes.
struct Counters {
  int64_t shared_accesses, shared_wavefronts, shared_ideal;
  int64_t global_accesses, global_sectors, global_ideal;
  int64_t launches, blocks;
};

// For machine.cpp and memory.cpp only.
namespace memory {
void begin_launch(size_t shared_bytes);
void begin_block(int threads);
void end_block();
void barrier_passed();
void warp_synchronised(int warp);
void thread_ended();
}  // namespace memory

// Runs kernel(params) for every thread; "" or what went wrong.
const char* launch(void (*kernel)(const void*), const void* params, Dim3 grid, Dim3 block, size_t shared_bytes);

}  // namespace emulator
