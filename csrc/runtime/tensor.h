// What a kernel sees: strided tensors, a step with its attributes, and the record of functions that is a kernel.
// Plain data only, so that this header may be included by objects compiled for one instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace llmopt {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, i64 = 3, i32 = 4, b8 = 5, u8 = 6, s8 = 7 };

constexpr int kMaxDims = 6;

// A strided view of memory the kernel does not own. data == nullptr means "operand not given".
struct Tensor {
  char* data;
  DType dtype;
  int32_t ndim;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];  // in elements
};

// Functions here are static: each object has its own copy, compiled for its own instruction set.
static inline int itemsize(DType d) {
  switch (d) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::i64:
      return 8;
    default:
      return 1;
  }
}

// Where position m of the first `outer` dimensions of t lies, in elements. Positions count in row-major order, so
// operands with different dimensions in front of their rows agree on which row is which.
static inline int64_t position_offset(const Tensor& t, int outer, int64_t m) {
  int64_t offset = 0;
  for (int d = outer - 1; d > 0; --d) {
    offset += m % t.size[d] * t.stride[d];
    m /= t.size[d];
  }
  return outer > 0 ? offset + m * t.stride[0] : 0;
}

// Attributes that several ops and pycompiler/llmopt/ops share.
enum NormKind : int64_t { kNormNone = 0, kNormRms = 1, kNormLayer = 2 };
enum RopeKind : int64_t { kRopeNone = 0, kRopeHalf = 1, kRopeInterleaved = 2 };
enum Activation : int64_t {
  kActNone = 0,
  kActRelu = 1,
  kActSilu = 2,
  kActGeluErf = 3,
  kActGeluTanh = 4,
  kActSigmoid = 5,
  kActTanh = 6,
  kActQuickGelu = 7,  // x * sigmoid(1.702 x)
  kActRelu2 = 8,      // relu(x)^2
};

// The chunks of a phase are shared out in ranges, one a thread (runtime/team.h).
static inline int64_t first_chunk(int64_t chunks, int threads, int thread) { return thread * chunks / threads; }
// Whether a chunk is some thread's first.
static inline bool is_first(int64_t chunks, int threads, int64_t chunk) {
  const int64_t thread = (chunk * threads + chunks - 1) / chunks;
  return first_chunk(chunks, threads, static_cast<int>(thread)) == chunk;
}
// Whether the thread that has a chunk in its range goes on with the one behind it.
static inline bool is_followed(int64_t chunks, int threads, int64_t chunk) {
  return chunk + 1 < chunks && !is_first(chunks, threads, chunk + 1);
}

// One resolved step of a program: operands and attributes in the order the op's file documents.
struct Step {
  const Tensor* t;
  const int64_t* i;
  const float* f;
  int32_t num_tensors, num_ints, num_floats;
};

// Memory a kernel may use while it runs. `shared` is one block for all threads of the step (size asked for through
// Kernel::workspace); `local` is private to the calling thread and kMostLocalBytes long, of which others than attention
// use kLocalBytes, half of an L2. Both are 64-byte aligned. `counters` are kCounters zeros for all threads: a kernel
// that counts leaves zeros again.
struct Scratch {
  char* shared;
  char* local;
  int32_t* counters = nullptr;
};
constexpr size_t kLocalBytes = 1 << 20;
constexpr size_t kMostLocalBytes =
    2 * kLocalBytes;  // reserved; attention over its longest heads needs more than half of an L2
constexpr int64_t kCounters = 1024;
constexpr int64_t kMostPlaces = 64;  // experts of one token, or what topk gives for a row

struct Span {
  const char* data;
  int64_t bytes;
};

// One op in one CPU tier. A step runs as `phases` rounds with a barrier after each; a round is cut into `chunks`:
// a thread has a range of them and helps others when it is through. `run` does one chunk. `first_read`, where an op has
// it, tells what a thread will read first in a phase or those after it: memory that no earlier step writes, which a
// thread that waits may fetch. Functions must not throw and not allocate.
struct Kernel {
  const char* op;
  int (*phases)(const Step&, int threads);
  int64_t (*chunks)(const Step&, int phase, int threads);
  size_t (*workspace)(const Step&, int threads);  // bytes of Scratch::shared; nullptr means none
  void (*run)(const Step&, int phase, int64_t chunk, int threads, const Scratch&);
  Span (*first_read)(const Step&, int phase, int threads, int thread) = nullptr;
};

// What one object file exports: the kernels of one family compiled for one tier.
struct KernelFamily {
  const Kernel* kernels;
  int32_t count;
  int32_t panel_width;    // columns of one packed weight panel (NR); 0 in families that pack nothing
  int32_t tile_rows = 0;  // rows of the largest register tile (MR) over such panels
};

}  // namespace llmopt
