// The driver API functions of csrc/cuda/driver.cpp over the emulator; "device" memory is the host's.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>

#include "emulator.h"

namespace {

struct Device {
  int capability = 80, multiprocessors = 4, shared_bytes = 166912;
  bool has_context = true;
} device;

constexpr int kInvalidValue = 1, kNotFound = 500, kLaunchFailed = 719;
int shared_bytes_asked_for = 0;

}  // namespace

extern "C" {

const char* emulator_message();

// The device that the attributes describe.
void emulator_device(int capability, int multiprocessors, int shared_bytes, bool has_context) {
  device = {capability, multiprocessors, shared_bytes, has_context};
}

int cuInit(unsigned) { return 0; }
int cuCtxGetCurrent(void** context) {
  *context = device.has_context ? &device : nullptr;
  return 0;
}
int cuCtxGetDevice(int* d) {
  *d = 0;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16:
      *value = device.multiprocessors;
      return 0;
    case 75:
      *value = device.capability / 10;
      return 0;
    case 76:
      *value = device.capability % 10;
      return 0;
    case 97:
      *value = device.shared_bytes;
      return 0;
    default:
      return kInvalidValue;
  }
}

// Kernels are functions of this library; a module is the library.
int cuModuleLoadData(void** module, const void*) {
  Dl_info here;
  if (!dladdr(reinterpret_cast<void*>(&cuInit), &here)) return kNotFound;
  *module = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  return *module ? 0 : kNotFound;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = dlsym(module, name);
  return *function ? 0 : kNotFound;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  if (attribute != 8 || value > device.shared_bytes) return kInvalidValue;
  shared_bytes_asked_for = value;
  return 0;
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void*, void** params, void**) {
  const bool fits = shared_bytes <= 48 << 10 || static_cast<int>(shared_bytes) <= shared_bytes_asked_for;
  const bool exists = grid_x && grid_y && grid_z && grid_y <= 65535 && grid_z <= 65535;
  if (!fits || !exists || block_x * block_y * block_z > 1024) return kInvalidValue;
  const auto kernel = reinterpret_cast<void (*)(const void*)>(function);
  const char* error =
      emulator::launch(kernel, params[0], {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes);
  return *error ? kLaunchFailed : 0;
}
int cuGetErrorString(int result, const char** text) {
  *text = result == kLaunchFailed ? emulator_message()
          : result == kNotFound   ? "named symbol not found"
                                  : "invalid value";
  return 0;
}

}  // extern "C"
