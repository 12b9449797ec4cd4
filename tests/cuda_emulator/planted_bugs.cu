// One mistake a kernel, each between a form that is right and what the emulator must find. 64 threads, 1024 bytes of
// shared memory; `in` and `out` hold 64 ints.
#include "cuda/memory.h"

struct Planted {
  const int* in;
  int* out;
};

using namespace llmopt::cuda;

#define KERNEL(name) extern "C" __global__ void name(const Planted __grid_constant__ p)
#define THREAD const int thread = threadIdx.x

KERNEL(right_exchange) {
  THREAD;
  store(shared<int>() + thread, load(Global<const int>(p.in) + thread));
  __syncthreads();
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + (63 - thread)));
}
KERNEL(missing_barrier) {
  THREAD;
  store(shared<int>() + thread, load(Global<const int>(p.in) + thread));
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + (63 - thread)));
}
KERNEL(missing_barrier_before_overwriting) {
  THREAD;
  store(shared<int>() + thread, thread);
  __syncthreads();
  const int other = load<int>(shared<int>() + (63 - thread));
  store(shared<int>() + thread, other);
  __syncthreads();
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + thread));
}

KERNEL(right_warp_exchange) {
  THREAD;
  store(shared<int>() + thread, thread);
  __syncwarp();
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + (thread ^ 1)));
}
KERNEL(missing_syncwarp) {
  THREAD;
  store(shared<int>() + thread, thread);
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + (thread ^ 1)));
}
KERNEL(syncwarp_across_warps) {
  THREAD;
  store(shared<int>() + thread, thread);
  __syncwarp();
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + (thread ^ 32)));
}

KERNEL(right_copy) {
  THREAD;
  if (thread < 16) copy_async(shared<int>() + 4 * thread, Global<const int>(p.in) + 4 * thread, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + thread));
}
KERNEL(missing_wait) {
  THREAD;
  if (thread < 16) copy_async(shared<int>() + 4 * thread, Global<const int>(p.in) + 4 * thread, 16);
  ptx::cp_async_commit();
  __syncthreads();
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + thread));
}
KERNEL(wait_for_too_few) {
  THREAD;
  if (thread < 16) copy_async(shared<int>() + 4 * thread, Global<const int>(p.in) + 4 * thread, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + thread));
}
KERNEL(missing_barrier_after_wait) {
  THREAD;
  if (thread < 16) copy_async(shared<int>() + 4 * thread, Global<const int>(p.in) + 4 * thread, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + thread));
}
KERNEL(copy_over_what_is_read) {
  THREAD;
  store(shared<int>() + thread, thread);
  __syncthreads();
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + (63 - thread)));
  if (thread < 16) copy_async(shared<int>() + 4 * thread, Global<const int>(p.in) + 4 * thread, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}
KERNEL(never_committed) { copy_async(shared<int>() + 4 * threadIdx.x, Global<const int>(p.in), 16); }
KERNEL(never_waited_for) {
  copy_async(shared<int>() + 4 * threadIdx.x, Global<const int>(p.in), 16);
  ptx::cp_async_commit();
}

KERNEL(misaligned_copy_to) { copy_async(shared<int>() + (2 * threadIdx.x + 1), Global<const int>(p.in), 16); }
KERNEL(misaligned_copy_from) { copy_async(shared<int>() + 4 * threadIdx.x, Global<const int>(p.in) + 1, 16); }
KERNEL(misaligned_load) {
  THREAD;
  store(Global<int>(p.out) + thread, load<int4>(Global<const int>(p.in) + thread % 8).x);
}
KERNEL(misaligned_matrices) {
  uint32_t r[4];
  store(shared<int4>() + static_cast<int>(threadIdx.x), int4{});
  __syncthreads();
  load_matrices(r, shared<int>() + threadIdx.x % 8);
  store(Global<int>(p.out), static_cast<int>(r[0]));
}

KERNEL(barrier_of_half_the_block) {
  if (threadIdx.x < 32) __syncthreads();
}
KERNEL(two_barriers) {
  if (threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();
}
KERNEL(barrier_against_collective) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncwarp();
}

KERNEL(right_shuffle_of_half_a_warp) {
  THREAD;
  if (thread < 16) store(Global<int>(p.out) + thread, __shfl_xor_sync(0x0000ffffu, thread, 1));
}
KERNEL(shuffle_without_half_the_lanes) {
  THREAD;
  if (thread < 16) store(Global<int>(p.out) + thread, __shfl_xor_sync(0xffffffffu, thread, 1));
}
KERNEL(shuffle_from_outside_the_mask) {
  THREAD;
  if (thread < 16) store(Global<int>(p.out) + thread, __shfl_xor_sync(0x0000ffffu, thread, 16));
}
KERNEL(shuffle_outside_its_own_mask) {
  THREAD;
  store(Global<int>(p.out) + thread, __shfl_xor_sync(0x0000ffffu, thread, 1));
}
KERNEL(product_without_a_lane) {
  int c[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x % 32 != 7) ptx::mma_m16n8k32_s8(c, a, b);
}

KERNEL(read_out_of_bounds) {
  THREAD;
  store(Global<int>(p.out) + thread, load(Global<const int>(p.in) + thread + 1));
}
KERNEL(wide_read_out_of_bounds) {
  THREAD;
  store(Global<int>(p.out) + thread, load<int4>(Global<const int>(p.in) + (thread + 1) / 4 * 4).x);
}
KERNEL(copy_out_of_bounds) {
  copy_async(shared<int>() + 4 * threadIdx.x, Global<const int>(p.in) + 4 * threadIdx.x, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}
KERNEL(write_out_of_bounds) { store(Global<int>(p.out) + -1 + threadIdx.x, 0); }
KERNEL(write_to_an_input) { store(Global<int>(const_cast<int*>(p.in)) + threadIdx.x, 0); }
KERNEL(stale_read_of_an_output) {
  THREAD;
  store(Global<int>(p.out) + thread, load<int>(Global<int>(p.out) + thread));
}
KERNEL(shared_out_of_bounds) { store(shared<int4>() + static_cast<int>(threadIdx.x) + 1, int4{}); }
KERNEL(shared_never_written) {
  THREAD;
  store(Global<int>(p.out) + thread, load<int>(shared<int>() + thread));
}

KERNEL(right_publication) {
  store(Global<int>(p.out) + threadIdx.x, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ptx::atomic_add(p.out, 1);
}
KERNEL(missing_fence) {
  store(Global<int>(p.out) + threadIdx.x, 1);
  __syncthreads();
  if (threadIdx.x == 0) ptx::atomic_add(p.out, 1);
}
KERNEL(missing_barrier_before_atomic) {
  store(Global<int>(p.out) + threadIdx.x, 1);
  __threadfence();
  if (threadIdx.x == 0) ptx::atomic_add(p.out, 1);
}

// What is right and slow: found by counting.
KERNEL(one_bank) {  // 32 lanes, 32 rows of 32 words in 4 KiB
  THREAD;
  if (thread < 32) store(shared<int>() + thread * 32, thread);
}
KERNEL(two_rows_a_bank) {  // eight 16-byte rows 64 bytes apart: the second four fall on the banks of the first
  THREAD;
  if (thread < 8) store(shared<int4>() + thread * 4, int4{});
}
KERNEL(strided) {
  THREAD;
  if (thread < 8) store(Global<int>(p.out) + thread * 8, thread);
}
