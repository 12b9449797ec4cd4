#include "gpu/launches.h"

#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>

namespace llmopt::gpu {
namespace {

// cuda.h: results and handles by the names used there. Nothing here links with CUDA or includes its headers.
using Result = int;
constexpr Result kInvalidValue = 1;

struct Driver {
  Result (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                           void**) = nullptr;
  Result (*cuGetErrorString)(Result, const char**) = nullptr;
  // May be missing.
  Result (*cuCtxGetCurrent)(void**) = nullptr;
  Result (*cuCtxSetCurrent)(void*) = nullptr;
  Result (*cuDevicePrimaryCtxRetain)(void**, int) = nullptr;
  Result (*cuFuncGetParamInfo)(void*, size_t, size_t*, size_t*) = nullptr;
  Result (*cuTensorMapEncodeTiled)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                                   const uint32_t*, int, int, int, int) = nullptr;
};

template <class F>
void bind(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
}

Driver opened(const char* name) {
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
  Driver d;
  bind(library, "cuLaunchKernel", d.cuLaunchKernel);
  bind(library, "cuGetErrorString", d.cuGetErrorString);
  bind(library, "cuCtxGetCurrent", d.cuCtxGetCurrent);
  bind(library, "cuCtxSetCurrent", d.cuCtxSetCurrent);
  bind(library, "cuDevicePrimaryCtxRetain", d.cuDevicePrimaryCtxRetain);
  bind(library, "cuFuncGetParamInfo", d.cuFuncGetParamInfo);
  bind(library, "cuTensorMapEncodeTiled", d.cuTensorMapEncodeTiled);
  if (!d.cuLaunchKernel || !d.cuGetErrorString)
    throw std::runtime_error(std::string(name) + " is not a CUDA driver: it lacks functions of the driver API");
  return d;
}

struct State {
  std::mutex mutex;
  Driver driver;
};
State& state() {
  static State the_state;
  return the_state;
}

const Driver& driver() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.driver.cuLaunchKernel) s.driver = opened("libcuda.so.1");
  return s.driver;
}

void check(const Driver& d, const std::string& call, Result result) {
  if (!result) return;
  const char* text = nullptr;
  d.cuGetErrorString(result, &text);
  throw std::runtime_error(call + ": " + (text ? text : "error " + std::to_string(result)));
}

// A thread that has not used the GPU yet has no context.
void ensure_context(const Driver& d, int device) {
  if (!d.cuCtxGetCurrent || !d.cuCtxSetCurrent || !d.cuDevicePrimaryCtxRetain) return;
  void* context = nullptr;
  check(d, "cuCtxGetCurrent", d.cuCtxGetCurrent(&context));
  if (context) return;
  check(d, "cuDevicePrimaryCtxRetain", d.cuDevicePrimaryCtxRetain(&context, device));
  check(d, "cuCtxSetCurrent", d.cuCtxSetCurrent(context));
}

struct alignas(64) TensorMap {
  char bytes[128];
};

// As triton's launcher describes a matrix: no interleaving, zeros outside, 128 bytes of L2 at once.
void encode(const Driver& d, const Matrix& m, uint64_t address, TensorMap* map) {
  constexpr int kNoInterleave = 0, kPromote128 = 2, kZeros = 0;
  const uint64_t sizes[] = {m.columns, m.rows}, strides[] = {m.row_bytes};
  const uint32_t box[] = {m.box_columns, m.box_rows}, steps[] = {1, 1};
  if (!d.cuTensorMapEncodeTiled) throw std::runtime_error("the CUDA driver lacks cuTensorMapEncodeTiled");
  check(d, "cuTensorMapEncodeTiled",
        d.cuTensorMapEncodeTiled(map, m.data_type, 2, reinterpret_cast<void*>(address), sizes, strides, box, steps,
                                 kNoInterleave, m.swizzle, kPromote128, kZeros));
}

}  // namespace

void open_driver(const std::string& library) {
  const Driver d = opened(library.c_str());
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().driver = d;
}

std::vector<size_t> parameter_bytes(uint64_t function) {
  const Driver& d = driver();
  if (!d.cuFuncGetParamInfo) throw std::runtime_error("the CUDA driver lacks cuFuncGetParamInfo");
  std::vector<size_t> found;
  while (true) {
    size_t offset = 0, size = 0;
    const Result r = d.cuFuncGetParamInfo(reinterpret_cast<void*>(function), found.size(), &offset, &size);
    if (r == kInvalidValue) return found;  // there is no such parameter
    check(d, "cuFuncGetParamInfo", r);
    found.push_back(size);
  }
}

void Launches::add(std::string kernel, uint64_t function, const std::vector<unsigned>& grid, unsigned threads,
                   unsigned shared_bytes, const std::vector<uint64_t>& slots, std::vector<uint32_t> parameters,
                   std::vector<Relocation> relocations, std::vector<Matrix> matrices) {
  if (grid.size() != 3) throw std::invalid_argument("a grid has three sizes");
  const auto first = static_cast<uint32_t>(slots_.size());
  const auto place = [&](uint32_t& slot) {
    if (slot >= slots.size())
      throw std::invalid_argument("slot " + std::to_string(slot) + " of " + std::to_string(slots.size()));
    slot += first;
  };
  for (uint32_t& p : parameters) place(p);
  for (Relocation& r : relocations) place(r.slot);
  for (Matrix& m : matrices) place(m.slot);
  launches_.push_back({std::move(kernel),
                       reinterpret_cast<void*>(function),
                       {grid[0], grid[1], grid[2]},
                       threads,
                       shared_bytes,
                       static_cast<uint32_t>(parameters_.size())});
  slots_.insert(slots_.end(), slots.begin(), slots.end());
  parameters_.insert(parameters_.end(), parameters.begin(), parameters.end());
  relocations_.insert(relocations_.end(), relocations.begin(), relocations.end());
  matrices_.insert(matrices_.end(), matrices.begin(), matrices.end());
}

std::shared_ptr<Launches> Launches::over(const std::vector<std::pair<uint32_t, uint32_t>>& renamed) const {
  auto other = std::make_shared<Launches>(*this);
  const auto rename = [&](uint32_t& buffer) {
    const auto it = std::find_if(renamed.begin(), renamed.end(), [&](const auto& r) { return r.first == buffer; });
    if (it != renamed.end()) buffer = it->second;
  };
  for (Relocation& r : other->relocations_) rename(r.buffer);
  for (Matrix& m : other->matrices_) rename(m.buffer);
  return other;
}

LaunchPlan::LaunchPlan(std::vector<std::shared_ptr<const Launches>> steps) : steps_(std::move(steps)) {
  for (const auto& step : steps_) {
    for (const Relocation& r : step->relocations_) buffer_count_ = std::max(buffer_count_, r.buffer + 1);
    for (const Matrix& m : step->matrices_)
      if (m.buffer != kFixed) buffer_count_ = std::max(buffer_count_, m.buffer + 1);
  }
  driver();
}

void LaunchPlan::run(int device, uint64_t stream, const std::vector<uint64_t>& addresses) const {
  if (addresses.size() < buffer_count_)
    throw std::invalid_argument(std::to_string(addresses.size()) + " addresses for " + std::to_string(buffer_count_) +
                                " buffers");
  const Driver& d = driver();
  ensure_context(d, device);
  // Of this thread: others may run the same plan.
  std::vector<uint64_t> slots;
  std::vector<void*> at, parameters;  // where each slot's value is; each parameter's
  std::vector<TensorMap> maps;
  for (const auto& step : steps_) {
    slots = step->slots_;
    for (const Relocation& r : step->relocations_) slots[r.slot] = addresses[r.buffer] + r.offset;
    at.resize(slots.size());
    for (size_t i = 0; i < slots.size(); ++i) at[i] = &slots[i];
    maps.resize(step->matrices_.size());
    for (size_t i = 0; i < maps.size(); ++i) {
      const Matrix& m = step->matrices_[i];
      encode(d, m, (m.buffer == kFixed ? 0 : addresses[m.buffer]) + m.offset, &maps[i]);
      at[m.slot] = &maps[i];
    }
    parameters.clear();
    for (uint32_t slot : step->parameters_) parameters.push_back(at[slot]);
    for (const Launches::Launch& l : step->launches_) {
      const Result r =
          d.cuLaunchKernel(l.function, l.grid[0], l.grid[1], l.grid[2], l.threads, 1, 1, l.shared_bytes,
                           reinterpret_cast<void*>(stream), parameters.data() + l.first_parameter, nullptr);
      if (r) check(d, "cuLaunchKernel " + l.kernel, r);
    }
  }
}

}  // namespace llmopt::gpu
