// Kernel launches that are ready but for addresses: made once for a step of a GPU plan, launched again and again.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace llmopt::gpu {

// An address that is known only when the launch is made: a buffer's, and so many bytes further.
struct Relocation {
  uint32_t slot;
  uint32_t buffer;
  int64_t offset;
};

// A matrix that the copy engine reads in boxes: its parameter is a tensor map of 128 bytes in place of a slot.
struct Matrix {
  uint32_t slot;
  uint32_t buffer;  // kFixed: offset is the address itself
  int64_t offset;
  int data_type, swizzle;  // CUtensorMapDataType, CUtensorMapSwizzle
  uint64_t rows, columns, row_bytes;
  uint32_t box_rows, box_columns;
};
constexpr uint32_t kFixed = UINT32_MAX;

// The launches of one step. A parameter is one slot of eight bytes or several, of which a kernel takes as many as it
// needs.
class Launches {
 public:
  struct Launch {
    std::string kernel;  // for messages
    void* function;      // CUfunction
    unsigned grid[3];
    unsigned threads;
    unsigned shared_bytes;
    uint32_t first_parameter;
  };

  // parameters: the slots at which they begin. Slots are counted from the first of this launch, also in relocations and
  // matrices. Throws std::invalid_argument for a slot it
  // does not have.
  void add(std::string kernel, uint64_t function, const std::vector<unsigned>& grid, unsigned threads,
           unsigned shared_bytes, const std::vector<uint64_t>& slots, std::vector<uint32_t> parameters,
           std::vector<Relocation> relocations, std::vector<Matrix> matrices);
  // The same launches over other buffers: (number, new number).
  std::shared_ptr<Launches> over(const std::vector<std::pair<uint32_t, uint32_t>>& renamed) const;

 private:
  friend class LaunchPlan;
  std::vector<Launch> launches_;
  std::vector<uint64_t> slots_;
  std::vector<uint32_t> parameters_;
  std::vector<Relocation> relocations_;
  std::vector<Matrix> matrices_;
};

// The steps of one call.
class LaunchPlan {
 public:
  // Throws std::runtime_error that says what is missing where there is no CUDA driver.
  explicit LaunchPlan(std::vector<std::shared_ptr<const Launches>> steps);
  // Launches everything on a stream of a device, in the context that is current in this thread, or the device's primary
  // one. addresses: of the buffers, by number. Throws std::invalid_argument where one is missing, std::runtime_error
  // with the kernel and the driver's words where it refuses.
  void run(int device, uint64_t stream, const std::vector<uint64_t>& addresses) const;

 private:
  std::vector<std::shared_ptr<const Launches>> steps_;
  uint32_t buffer_count_ = 0;  // addresses that a call must give
};

// The bytes of each parameter of a compiled kernel. Throws std::runtime_error where the driver cannot tell (before
// CUDA 12.4).
std::vector<size_t> parameter_bytes(uint64_t function);
// Opens the driver by this name or path instead of the usual one; for tests, before anything is launched.
void open_driver(const std::string& library);

}  // namespace llmopt::gpu
