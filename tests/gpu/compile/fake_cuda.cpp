// A CUDA driver that launches nothing: it writes down what it is asked to launch, for the test that loads it to read.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {
std::map<void*, std::vector<uint64_t>> sizes;  // of a function's parameters, as the test defines them
std::vector<std::string> log;
int refusal = 0;

void put(std::string& line, const void* data, size_t bytes) { line.append(static_cast<const char*>(data), bytes); }
}  // namespace

extern "C" {
void define(void* function, const uint64_t* bytes, int count) { sizes[function] = {bytes, bytes + count}; }
void refuse(int result) { refusal = result; }
int take(int number, char* out, int room) {
  if (number >= static_cast<int>(log.size())) return -1;
  const std::string& line = log[number];
  if (static_cast<int>(line.size()) <= room) std::memcpy(out, line.data(), line.size());
  return static_cast<int>(line.size());
}
void forget() { log.clear(); }

int cuGetErrorString(int result, const char** text) {
  *text = result == 1 ? "invalid argument" : "a refusal of the test's";
  return 0;
}

int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
  const auto& found = sizes[function];
  if (index >= found.size()) return 1;
  *offset = 0;
  *size = found[index];
  return 0;
}

// Of a tensor map it keeps what it was made from.
int cuTensorMapEncodeTiled(char* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
                           const uint32_t* box, const uint32_t*, int, int swizzle, int, int) {
  if (reinterpret_cast<uintptr_t>(map) % 64) return 1;
  std::string line;
  const uint64_t numbers[] = {reinterpret_cast<uint64_t>(address), dims[0], dims[1], strides[0], box[0], box[1],
                              static_cast<uint64_t>(type), static_cast<uint64_t>(swizzle), rank};
  put(line, numbers, sizeof numbers);
  line.resize(128);
  std::memcpy(map, line.data(), 128);
  return 0;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void* stream, void** parameters, void**) {
  if (refusal) return refusal;
  std::string line;
  const uint64_t head[] = {reinterpret_cast<uint64_t>(function), x, y, z, threads, shared,
                           reinterpret_cast<uint64_t>(stream)};
  put(line, head, sizeof head);
  const auto& bytes = sizes[function];
  for (size_t i = 0; i < bytes.size(); ++i) put(line, parameters[i], bytes[i]);
  log.push_back(line);
  return 0;
}
}
