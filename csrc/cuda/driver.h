// The CUDA driver, opened when it is first needed: nothing here links with CUDA or includes its headers.
#pragma once
#include <cstddef>
#include <string>

namespace llmopt::cuda {

// A kernel file compiled for one architecture; the build writes the list (cubins.cpp).
struct Cubin {
  const char* file;  // the .cu file's stem
  int architecture;  // 80 for sm_80
  const void* image;
};
extern const Cubin kCubins[];
extern const int kCubinCount;

struct Grid {
  unsigned x, y, z;
};

// Which kernel solves a problem, and how many threads it takes. No kernel: there is nothing to do.
struct Planned {
  const char* file = nullptr;
  std::string kernel;
  Grid grid{};
  int threads = 0, shared_bytes = 0;
};

// All return "" or what is wrong, for the context that is current in this thread.
class Driver {
 public:
  // Opens libcuda (a name or a path); a second call does nothing.
  std::string open(const char* library);
  // Whether kernels can be launched now.
  std::string check();
  std::string multiprocessors(int* count);
  // The kernel's function in the current context, ready to be launched; loads its file's cubin the first time.
  std::string prepare(const Planned& planned, void** function);
  // kernel(*params).
  std::string launch(const Planned& planned, const void* params, void* stream);
};
Driver& driver();

}  // namespace llmopt::cuda
