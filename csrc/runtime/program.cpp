#include "runtime/program.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "runtime/expr.h"

namespace llmopt {

// Of what a waiting thread fetches: a good part of a core's L2, beside which the running step's data stays.
constexpr int64_t kMostFetched = 128 << 10;
constexpr size_t kMaxOperands = 64;

constexpr const char* kDtypeNames[] = {"f32", "f16", "bf16", "i64", "i32", "b8", "u8", "s8"};

// As in plans: [3,4]f32, or - for an operand that is not given.
std::string operands_in_words(const Step& step) {
  std::string words;
  for (int n = 0; n < step.num_tensors; ++n) {
    const Tensor& t = step.t[n];
    words += n ? ", " : "";
    if (!t.data && t.ndim == 0) {
      words += "-";
      continue;
    }
    for (int d = 0; d < t.ndim; ++d) words += (d ? "," : "[") + std::to_string(t.size[d]);
    words += t.ndim ? "]" : "[]";
    const auto code = static_cast<size_t>(t.dtype);
    words += code < std::size(kDtypeNames) ? kDtypeNames[code] : "?";
  }
  return words;
}

// What one run needs and the next may reuse. A context belongs to one thread at a time.
struct Program::Context {
  const Program* program = nullptr;
  int threads = 0;  // that everything here is resolved for; 0: nothing is
  std::vector<int64_t> values, stack, slot_offset, ints;
  std::vector<char*> bases;  // of the buffers
  std::vector<Tensor> tensors;
  std::vector<Step> steps;
  std::vector<int> phases;
  Memory arena, workspace, local;
  Memory counters{kCounters * sizeof(int32_t)};
  std::vector<int64_t>* step_ns = nullptr;
};

struct Program::ContextLease {
  explicit ContextLease(Program& p) : program(p) {
    std::lock_guard<std::mutex> lock(p.mutex_);
    if (p.idle_.empty()) {
      context = std::make_unique<Context>();
      return;
    }
    context = std::move(p.idle_.back());
    p.idle_.pop_back();
  }
  ~ContextLease() {
    std::lock_guard<std::mutex> lock(program.mutex_);
    program.idle_.push_back(std::move(context));
  }
  Program& program;
  std::unique_ptr<Context> context;
};

Program::Program(const Tier& tier, int num_symbols, int num_externals, std::vector<std::vector<int64_t>> exprs,
                 std::vector<std::vector<ExprId>> slots, std::vector<Buffer> buffers, std::vector<StepSpec> steps)
    : num_symbols_(num_symbols),
      num_externals_(num_externals),
      exprs_(std::move(exprs)),
      slots_(std::move(slots)),
      buffers_(std::move(buffers)),
      steps_(std::move(steps)),
      panel_width_(tier.panel_width()) {
  for (const auto& code : exprs_)
    for (size_t i = 0; i < code.size(); ++i) {
      const bool has_operand = code[i] == kConst || code[i] == kSymbol;
      if (code[i] == kSymbol && (i + 1 >= code.size() || code[i + 1] < 0 || code[i + 1] >= num_symbols_))
        throw std::invalid_argument("a size expression names a symbol that does not exist");
      if (has_operand) ++i;
    }
  const int num_exprs = static_cast<int>(exprs_.size());
  for (const auto& slot : slots_)
    for (ExprId e : slot)
      if (e < 0 || e >= num_exprs) throw std::invalid_argument("an arena slot names an expression that does not exist");
  for (const Buffer& b : buffers_)
    if (b.index < 0 || b.index >= (b.external ? num_externals_ : static_cast<int>(slots_.size())))
      throw std::invalid_argument("a buffer names memory that does not exist");
  for (const StepSpec& step : steps_) {
    const Kernel* kernel = tier.find(step.op);
    if (!kernel)
      throw std::invalid_argument("tier " + std::string(tier.name) + " has no kernel for op '" + step.op + "'");
    kernels_.push_back(kernel);
    contracts_.push_back(contract_of(kernel->op));
    tile_rows_.push_back(tier.tile_rows(step.op));
    if (step.operands.size() > kMaxOperands) throw std::invalid_argument("a step has too many operands");
    for (const Operand& operand : step.operands) check(operand);
    for (ExprId e : step.ints)
      if (e < 0 || e >= num_exprs) throw std::invalid_argument("an attribute names an expression that does not exist");
  }
  sort_steps();
}

Program::~Program() = default;

bool Program::varies(const StepSpec& step) const {
  const auto known = [&](ExprId e) { return std::binary_search(varying_exprs_.begin(), varying_exprs_.end(), e); };
  const auto any = [&](const std::vector<ExprId>& list) { return std::any_of(list.begin(), list.end(), known); };
  const auto moves = [&](const Operand& o) {
    return o.buffer >= 0 && (known(o.offset) || any(o.size) || any(o.stride));
  };
  return any(step.ints) || std::any_of(step.operands.begin(), step.operands.end(), moves);
}

// What stays from run to run, and what does not.
void Program::sort_steps() {
  for (size_t e = 0; e < exprs_.size(); ++e)
    if (has_symbol(exprs_[e])) varying_exprs_.push_back(static_cast<ExprId>(e));
  uses_.resize(buffers_.size());
  size_t tensors = 0, ints = 0;
  for (size_t k = 0; k < steps_.size(); ++k) {
    const StepSpec& step = steps_[k];
    first_tensor_.push_back(tensors), first_int_.push_back(ints);
    if (contracts_[k].looks_inside || varies(step))
      varying_steps_.push_back(k);
    else
      for (size_t n = 0; n < step.operands.size(); ++n)
        if (const Operand& o = step.operands[n]; o.buffer >= 0)
          uses_[static_cast<size_t>(o.buffer)].push_back({tensors + n, o.offset, o.dtype});
    tensors += step.operands.size(), ints += step.ints.size();
  }
  first_tensor_.push_back(tensors), first_int_.push_back(ints);
}

void Program::check(const Operand& o) const {
  if (o.buffer == -1) return;
  if (o.buffer < 0 || o.buffer >= static_cast<int>(buffers_.size()))
    throw std::invalid_argument("an operand names a buffer that does not exist");
  if (o.size.size() != o.stride.size() || o.size.size() > kMaxDims)
    throw std::invalid_argument("an operand needs as many strides as sizes and at most 6 of each");
  const int num_exprs = static_cast<int>(exprs_.size());
  auto bad = [&](ExprId e) { return e < 0 || e >= num_exprs; };
  if (bad(o.offset) || std::any_of(o.size.begin(), o.size.end(), bad) ||
      std::any_of(o.stride.begin(), o.stride.end(), bad))
    throw std::invalid_argument("an operand names an expression that does not exist");
}

void Program::check(const Step& step, size_t index) const {
  const StepSpec& spec = steps_[index];
  for (int n = 0; n < step.num_tensors; ++n)
    for (int d = 0; d < step.t[n].ndim; ++d)
      if (step.t[n].size[d] < 0) throw std::invalid_argument(spec.op + ": a size is negative");
  if (!contracts_[index].reason) return;
  bool is_external[kMaxOperands];
  for (int n = 0; n < step.num_tensors; ++n)
    is_external[n] = spec.operands[n].buffer >= 0 && buffers_[spec.operands[n].buffer].external;
  IndexFault fault{};
  const char* reason = contracts_[index].reason({step, is_external, panel_width_, tile_rows_[index], &fault});
  if (reason == kIndexRange)
    throw std::out_of_range(spec.op + ": index " + std::to_string(fault.index) + " is out of range: 0 to " +
                            std::to_string(fault.limit - 1) + " are possible");
  if (reason) throw std::invalid_argument(spec.op + ": " + reason + "; operands: " + operands_in_words(step));
}

std::vector<int64_t> Program::sizes(const std::vector<int64_t>& symbols, const std::vector<ExprId>& wanted) const {
  if (static_cast<int>(symbols.size()) != num_symbols_) throw std::invalid_argument("wrong number of sizes");
  std::vector<int64_t> values, stack;
  values.reserve(wanted.size());
  for (ExprId e : wanted) values.push_back(evaluate(exprs_.at(static_cast<size_t>(e)), symbols, stack));
  return values;
}

// The bases of this run's buffers, and with them the operands of steps that do not vary. False when a buffer has come
// or gone: contracts ask whether operands are there.
bool Program::move_buffers(Context& c, const std::vector<int64_t>& externals) const {
  bool same = true;
  for (size_t b = 0; b < buffers_.size(); ++b) {
    const auto index = static_cast<size_t>(buffers_[b].index);
    char* base =
        buffers_[b].external ? reinterpret_cast<char*>(externals[index]) : c.arena.data() + c.slot_offset[index];
    if (base == c.bases[b]) continue;
    same = same && (base == nullptr) == (c.bases[b] == nullptr);
    c.bases[b] = base;
    for (const Use& use : uses_[b]) c.tensors[use.tensor].data = base + c.values[use.offset] * itemsize(use.dtype);
  }
  return same;
}

void Program::resolve_step(Context& c, size_t k, int threads) const {
  const StepSpec& spec = steps_[k];
  Tensor* t = c.tensors.data() + first_tensor_[k];
  int64_t* attr = c.ints.data() + first_int_[k];
  Step& step = c.steps[k];
  step = {t,
          attr,
          spec.floats.data(),
          static_cast<int32_t>(spec.operands.size()),
          static_cast<int32_t>(spec.ints.size()),
          static_cast<int32_t>(spec.floats.size())};
  for (const Operand& o : spec.operands) {
    Tensor& out = *t++;
    out = Tensor{};
    if (o.buffer < 0) continue;
    out.data = c.bases[o.buffer] + c.values[o.offset] * itemsize(o.dtype);
    out.dtype = o.dtype;
    out.ndim = static_cast<int32_t>(o.size.size());
    for (int d = 0; d < out.ndim; ++d) {
      out.size[d] = c.values[o.size[d]];
      out.stride[d] = c.values[o.stride[d]];
    }
  }
  for (ExprId e : spec.ints) *attr++ = c.values[e];
  check(step, k);
  c.phases[k] = kernels_[k]->phases(step, threads);
  if (kernels_[k]->workspace) c.workspace.reserve(kernels_[k]->workspace(step, threads));
}

void Program::resolve(Context& c, const std::vector<int64_t>& externals, const std::vector<int64_t>& symbols,
                      int threads) {
  bool follows = c.threads == threads;
  c.threads = 0;  // until all of it is right
  if (follows) {
    for (ExprId e : varying_exprs_) c.values[e] = evaluate(exprs_[e], symbols, c.stack);
  } else {
    c.values.resize(exprs_.size());
    for (size_t i = 0; i < exprs_.size(); ++i) c.values[i] = evaluate(exprs_[i], symbols, c.stack);
    c.slot_offset.resize(slots_.size());
    c.bases.assign(buffers_.size(), nullptr);
    c.tensors.resize(first_tensor_.back());
    c.ints.resize(first_int_.back());
    c.steps.resize(steps_.size());
    c.phases.resize(steps_.size());
  }

  size_t arena = 0;
  for (size_t i = 0; i < slots_.size(); ++i) {
    int64_t bytes = 0;
    for (ExprId e : slots_[i]) bytes = std::max(bytes, c.values[e]);
    c.slot_offset[i] = static_cast<int64_t>(arena);
    arena += (static_cast<size_t>(bytes) + 255) / 256 * 256;  // 256: neighbours never share a line or its pair
  }
  c.arena.reserve(arena);
  follows = move_buffers(c, externals) && follows;
  if (follows)
    for (size_t k : varying_steps_) resolve_step(c, k, threads);
  else
    for (size_t k = 0; k < steps_.size(); ++k) resolve_step(c, k, threads);
  c.local.reserve(kMostLocalBytes * static_cast<size_t>(threads));
  c.threads = threads;
}

// What a thread will read next after a phase of step k, as far as a few steps tell.
Span Program::first_read_after(const Context& c, size_t k, int phase, int threads, int thread) const {
  constexpr size_t kStepsAhead = 3;
  const size_t end = std::min(c.steps.size(), k + kStepsAhead);
  for (++phase; k < end; ++k, phase = 0) {
    if (phase >= c.phases[k] || !kernels_[k]->first_read) continue;
    const Span span = kernels_[k]->first_read(c.steps[k], phase, threads, thread);
    if (span.bytes > 0) return {span.data, std::min(span.bytes, kMostFetched)};
  }
  return {};
}

void Program::body(Team& team, int thread, void* context) {
  Context& c = *static_cast<Context*>(context);
  const Program& p = *c.program;
  const Scratch scratch{c.workspace.data(), c.local.data() + kMostLocalBytes * static_cast<size_t>(thread),
                        reinterpret_cast<int32_t*>(c.counters.data())};
  const int threads = c.threads;  // that everything was planned for, however many came
  const bool timed = thread == 0 && c.step_ns;
  auto last = std::chrono::steady_clock::now();
  uint32_t phases = 0;  // of all steps so far
  for (size_t k = 0; k < c.steps.size(); ++k) {
    const Kernel& kernel = *p.kernels_[k];
    const Step& step = c.steps[k];
    for (int phase = 0; phase < c.phases[k]; ++phase) {
      const int64_t chunks = kernel.chunks(step, phase, threads);
      ++phases;
      for (int64_t i = -1; (i = team.next_chunk(thread, phases, chunks, i)) < chunks;)
        kernel.run(step, phase, i, threads, scratch);
      team.barrier([&] { return p.first_read_after(c, k, phase, threads, thread); });
    }
    if (!timed) continue;
    auto now = std::chrono::steady_clock::now();
    (*c.step_ns)[k] = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last).count();
    last = now;
  }
}

void Program::run(const std::vector<int64_t>& externals, const std::vector<int64_t>& symbols, int threads,
                  std::vector<int64_t>* step_ns) {
  if (static_cast<int>(externals.size()) != num_externals_ || static_cast<int>(symbols.size()) != num_symbols_)
    throw std::invalid_argument("a program was run with " + std::to_string(externals.size()) + " addresses and " +
                                std::to_string(symbols.size()) + " sizes; it needs " + std::to_string(num_externals_) +
                                " and " + std::to_string(num_symbols_));
  ContextLease lease(*this);
  Context& c = *lease.context;
  c.program = this;
  c.step_ns = step_ns;
  if (step_ns) step_ns->assign(steps_.size(), 0);
  threads = std::max(threads, 1);
  resolve(c, externals, symbols, threads);
  arena_bytes_ = c.arena.bytes();
  barriers_ = std::accumulate(c.phases.begin(), c.phases.end(), int64_t{0});
  parallel(threads, &Program::body, &c);
}

}  // namespace llmopt
