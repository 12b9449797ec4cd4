#include "cuda/driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>

namespace llmopt::cuda {
namespace {

// cuda.h: results and handles by the names used there, attributes by their numbers.
using Result = int;
using Device = int;
using Handle = void*;
constexpr int kMultiprocessorCount = 16, kCapabilityMajor = 75, kCapabilityMinor = 76, kMaxSharedBytes = 97;
constexpr int kFunctionSharedBytes = 8;
constexpr int kSharedBytesUnasked = 48 << 10;  // more must be asked for

struct Api {
  Result (*cuInit)(unsigned);
  Result (*cuCtxGetCurrent)(Handle*);
  Result (*cuCtxGetDevice)(Device*);
  Result (*cuDeviceGetAttribute)(int*, int, Device);
  Result (*cuModuleLoadData)(Handle*, const void*);
  Result (*cuModuleGetFunction)(Handle*, Handle, const char*);
  Result (*cuFuncSetAttribute)(Handle, int, int);
  Result (*cuLaunchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                           void**);
  Result (*cuGetErrorString)(Result, const char**);
};

struct State {
  std::mutex mutex;
  void* library = nullptr;
  Api api{};
  std::map<std::pair<Handle, std::string>, Handle> modules;    // (context, file)
  std::map<std::pair<Handle, std::string>, Handle> functions;  // (context, kernel)
};
State& state() {
  static State the_state;
  return the_state;
}

std::string said(const char* call, Result result) {
  const char* text = nullptr;
  state().api.cuGetErrorString(result, &text);
  return std::string(call) + ": " + (text ? text : "error " + std::to_string(result));
}

std::string attribute(int which, int* value) {
  Device device = 0;
  if (Result r = state().api.cuCtxGetDevice(&device)) return said("cuCtxGetDevice", r);
  if (Result r = state().api.cuDeviceGetAttribute(value, which, device)) return said("cuDeviceGetAttribute", r);
  return "";
}

std::string current_context(Handle* context) {
  if (!state().library) return "the CUDA driver has not been opened";
  if (Result r = state().api.cuCtxGetCurrent(context)) return said("cuCtxGetCurrent", r);
  if (!*context) return "no CUDA context is current in this thread: torch.cuda.init() makes one";
  return "";
}

// The newest build of the file that this GPU runs: the same major version, and no newer minor one.
std::string find_cubin(const char* file, const Cubin** found) {
  int major = 0, minor = 0;
  if (std::string e = attribute(kCapabilityMajor, &major); !e.empty()) return e;
  if (std::string e = attribute(kCapabilityMinor, &minor); !e.empty()) return e;
  std::string built;
  for (const Cubin* c = kCubins; c != kCubins + kCubinCount; ++c) {
    if (std::string(c->file) != file) continue;
    built += (built.empty() ? "sm_" : ", sm_") + std::to_string(c->architecture);
    if (c->architecture / 10 != major || c->architecture % 10 > minor) continue;
    if (!*found || c->architecture > (*found)->architecture) *found = c;
  }
  if (*found) return "";
  return "this GPU is sm_" + std::to_string(10 * major + minor) + "; the kernels were built for " + built;
}

std::string find_function(Handle context, const char* file, const std::string& kernel, Handle* function) {
  Api& api = state().api;
  Handle& cached = state().functions[{context, kernel}];
  if (!cached) {
    Handle& module = state().modules[{context, file}];
    if (!module) {
      const Cubin* cubin = nullptr;
      if (std::string e = find_cubin(file, &cubin); !e.empty()) return e;
      if (Result r = api.cuModuleLoadData(&module, cubin->image)) return said("cuModuleLoadData", r);
    }
    if (Result r = api.cuModuleGetFunction(&cached, module, kernel.c_str()))
      return said(("cuModuleGetFunction " + kernel).c_str(), r);
  }
  *function = cached;
  return "";
}

template <class F>
bool bind(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

Driver& driver() {
  static Driver the_driver;
  return the_driver;
}

std::string Driver::open(const char* name) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  if (state().library) return "";
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::string("no CUDA driver: ") + dlerror();
  Api api{};
  const bool complete = bind(library, "cuInit", api.cuInit) && bind(library, "cuCtxGetCurrent", api.cuCtxGetCurrent) &&
                        bind(library, "cuCtxGetDevice", api.cuCtxGetDevice) &&
                        bind(library, "cuDeviceGetAttribute", api.cuDeviceGetAttribute) &&
                        bind(library, "cuModuleLoadData", api.cuModuleLoadData) &&
                        bind(library, "cuModuleGetFunction", api.cuModuleGetFunction) &&
                        bind(library, "cuFuncSetAttribute", api.cuFuncSetAttribute) &&
                        bind(library, "cuLaunchKernel", api.cuLaunchKernel) &&
                        bind(library, "cuGetErrorString", api.cuGetErrorString);
  if (!complete) return std::string(name) + " is not a CUDA driver: it lacks functions of the driver API";
  state().api = api;
  if (Result r = api.cuInit(0)) return said("cuInit", r);
  state().library = library;
  return "";
}

std::string Driver::check() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  Handle context = nullptr;
  if (std::string e = current_context(&context); !e.empty()) return e;
  if (kCubinCount == 0) return "this build holds no kernels";
  const Cubin* cubin = nullptr;
  return find_cubin(kCubins[0].file, &cubin);
}

std::string Driver::multiprocessors(int* count) {
  Handle context = nullptr;
  if (std::string e = current_context(&context); !e.empty()) return e;
  return attribute(kMultiprocessorCount, count);
}

std::string Driver::prepare(const Planned& planned, void** function) {
  Handle context = nullptr;
  if (std::string e = current_context(&context); !e.empty()) return e;
  {
    const std::lock_guard<std::mutex> lock(state().mutex);
    if (std::string e = find_function(context, planned.file, planned.kernel, function); !e.empty()) return e;
  }
  if (planned.shared_bytes <= kSharedBytesUnasked) return "";
  int limit = 0;
  if (std::string e = attribute(kMaxSharedBytes, &limit); !e.empty()) return e;
  if (planned.shared_bytes > limit)
    return planned.kernel + " needs " + std::to_string(planned.shared_bytes) +
           " bytes of shared memory; this GPU has " + std::to_string(limit) + " for a block";
  const Result r = state().api.cuFuncSetAttribute(*function, kFunctionSharedBytes, planned.shared_bytes);
  return r ? said("cuFuncSetAttribute", r) : "";
}

std::string Driver::launch(const Planned& planned, const void* params, void* stream) {
  Handle function = nullptr;
  if (std::string e = prepare(planned, &function); !e.empty()) return e;
  void* parameters[] = {const_cast<void*>(params)};
  const Grid& grid = planned.grid;
  const Result r = state().api.cuLaunchKernel(function, grid.x, grid.y, grid.z, planned.threads, 1, 1,
                                              planned.shared_bytes, stream, parameters, nullptr);
  return r ? said(("cuLaunchKernel " + planned.kernel).c_str(), r) : "";
}

}  // namespace llmopt::cuda
