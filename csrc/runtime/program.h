// A program: the native segment of a plan as data. Built once, run many times, from several threads at once.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "runtime/contracts.h"
#include "runtime/memory.h"
#include "runtime/team.h"
#include "runtime/tensor.h"

namespace llmopt {

using ExprId = int32_t;

// Where a tensor's memory is: a pointer the caller passes at each run, or a slot of the run's arena.
struct Buffer {
  bool external;
  int32_t index;
};

struct Operand {
  int32_t buffer = -1;  // -1: operand not given
  DType dtype = DType::f32;
  ExprId offset = 0;  // elements
  std::vector<ExprId> size, stride;
};

struct StepSpec {
  std::string op;
  std::vector<Operand> operands;
  std::vector<ExprId> ints;
  std::vector<float> floats;
};

class Program {
 public:
  // exprs: postfix code of every size expression; slots: per arena slot the expressions of its sizes in bytes (the
  // largest counts). Throws std::invalid_argument for unknown ops and indices out of range.
  Program(const Tier& tier, int num_symbols, int num_externals, std::vector<std::vector<int64_t>> exprs,
          std::vector<std::vector<ExprId>> slots, std::vector<Buffer> buffers, std::vector<StepSpec> steps);

  ~Program();

  // Runs every step in order. externals: one address per external buffer; symbols: the values of this call's sizes.
  // step_ns: when not null, receives the wall time of each step in nanoseconds. Throws std::invalid_argument before
  // anything runs when the operands of a step are not what its kernel takes for granted (runtime/contracts.cpp).
  void run(const std::vector<int64_t>& externals, const std::vector<int64_t>& symbols, int threads,
           std::vector<int64_t>* step_ns);

  // The values of some size expressions for these symbols.
  std::vector<int64_t> sizes(const std::vector<int64_t>& symbols, const std::vector<ExprId>& wanted) const;

  size_t num_steps() const { return steps_.size(); }
  // Bytes of the arena at the last run that needed a new layout; 0 before the first.
  size_t arena_bytes() const { return arena_bytes_; }
  // Of the last run: phases of its steps, after each of which all threads wait for each other.
  int64_t barriers() const { return barriers_; }

 private:
  struct Context;
  struct ContextLease;
  struct Use {
    size_t tensor;  // among the operands of all steps
    ExprId offset;
    DType dtype;
  };

  void check(const Operand& operand) const;
  void check(const Step& step, size_t index) const;
  bool varies(const StepSpec& step) const;
  void sort_steps();
  void resolve(Context& c, const std::vector<int64_t>& externals, const std::vector<int64_t>& symbols, int threads);
  void resolve_step(Context& c, size_t k, int threads) const;
  bool move_buffers(Context& c, const std::vector<int64_t>& externals) const;
  Span first_read_after(const Context& c, size_t k, int phase, int threads, int thread) const;
  static void body(Team& team, int thread, void* context);

  const int num_symbols_, num_externals_;
  const std::vector<std::vector<int64_t>> exprs_;
  const std::vector<std::vector<ExprId>> slots_;
  const std::vector<Buffer> buffers_;
  const std::vector<StepSpec> steps_;
  std::vector<const Kernel*> kernels_;
  std::vector<Contract> contracts_;
  std::vector<int> tile_rows_;  // of each step's op
  const int panel_width_;
  std::vector<size_t> first_tensor_, first_int_;  // of each step, and behind the last
  // What has to be made again by a run that follows another one: expressions over symbols, and the steps that read one
  // of them or whose contract looks at memory.
  std::vector<ExprId> varying_exprs_;
  std::vector<size_t> varying_steps_;
  std::vector<std::vector<Use>> uses_;  // by buffer: the operands of the other steps that lie in it
  std::mutex mutex_;
  std::vector<std::unique_ptr<Context>> idle_;
  std::atomic<size_t> arena_bytes_{0};  // for information: of whichever run came last
  std::atomic<int64_t> barriers_{0};
};

}  // namespace llmopt
