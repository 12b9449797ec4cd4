// What threads do to memory: bounds, alignment, bytes never written, hazards between threads, copies on their way, and
// how a warp's accesses fall onto banks and sectors.
#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <unordered_map>
#include <vector>

#include "emulator.h"

extern "C" emulator::Counters* emulator_counters();

namespace emulator {
namespace {

struct Buffer {
  uintptr_t begin, end;
  bool writable;
};
std::vector<Buffer> buffers;

constexpr int kNobody = -1, kSeveral = -2;

// Who touched a byte of shared memory last, and when: the epoch counts the block's barriers, the warp epoch the
// __syncwarps of the toucher's warp.
struct Touch {
  int thread = kNobody;
  uint32_t epoch = 0, warp_epoch = 0;
};
struct Byte {
  bool written = false;
  int in_flight = kNobody;  // the thread whose copy is on its way
  Touch write, read;
};

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
};
struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

std::vector<unsigned char> storage;
unsigned char* shared_begin = nullptr;
std::vector<Byte> bytes_of_shared;
std::vector<Copies> copies;
std::vector<uint32_t> warp_epochs;
uint32_t epoch = 0;

// A thread's last write to global memory: other blocks may be told of it when it is fenced and the block has met since.
struct Published {
  bool wrote = false, fenced = false;
  uint32_t epoch = 0;
};
std::vector<Published> published;  // per thread

// Accesses of one instruction by one warp: the code address and how often each lane has been there.
bool counting = false;
struct Group {
  bool is_shared;
  int bytes;
  uint32_t lanes;
  uintptr_t address[32];
};
using Key = std::pair<uintptr_t, uint32_t>;                        // code address, occurrence
std::vector<std::unordered_map<uintptr_t, uint32_t>> occurrences;  // per thread
std::vector<std::map<Key, Group>> groups;                          // per warp

void count_access(void* code, bool is_shared, const void* address, int bytes) {
  if (!counting) return;
  const int thread = linear_thread();
  const uintptr_t site = reinterpret_cast<uintptr_t>(code);
  Group& g = groups[thread / 32][{site, occurrences[thread][site]++}];
  g.is_shared = is_shared;
  g.bytes = bytes;
  g.lanes |= 1u << thread % 32;
  g.address[thread % 32] = reinterpret_cast<uintptr_t>(address);
}

// 16-byte accesses pass in quarters of a warp, 8-byte ones in halves; a pass takes one wavefront for every different
// word that falls onto the same bank.
void count_shared(const Group& g, Counters& c) {
  const int lanes_per_pass = g.bytes == 16 ? 8 : g.bytes == 8 ? 16 : 32;
  ++c.shared_accesses;
  for (int first = 0; first < 32; first += lanes_per_pass) {
    std::set<uintptr_t> words[32];
    size_t wavefronts = 0;
    for (int l = first; l < first + lanes_per_pass; ++l) {
      if (!(g.lanes >> l & 1)) continue;
      for (uintptr_t at = g.address[l]; at < g.address[l] + g.bytes; at += 4) {
        const uintptr_t word = (at - reinterpret_cast<uintptr_t>(shared_begin)) / 4;
        words[word % 32].insert(word);
        wavefronts = std::max(wavefronts, words[word % 32].size());
      }
    }
    c.shared_wavefronts += static_cast<int64_t>(wavefronts);
    c.shared_ideal += wavefronts > 0;
  }
}

void count_global(const Group& g, Counters& c) {
  std::set<uintptr_t> sectors, touched;
  for (int l = 0; l < 32; ++l) {
    if (!(g.lanes >> l & 1)) continue;
    for (uintptr_t at = g.address[l]; at < g.address[l] + g.bytes; ++at) {
      sectors.insert(at / 32);
      touched.insert(at);
    }
  }
  ++c.global_accesses;
  c.global_sectors += static_cast<int64_t>(sectors.size());
  c.global_ideal += static_cast<int64_t>((touched.size() + 31) / 32);
}

// Whether this thread's access comes after that one: the same thread, an earlier epoch, or a __syncwarp in between.
bool is_ordered_after(const Touch& t) {
  const int me = linear_thread();
  if (t.thread == kNobody || t.thread == me || t.epoch != epoch) return true;
  return t.thread >= 0 && t.thread / 32 == me / 32 && t.warp_epoch < warp_epochs[me / 32];
}

Touch now() { return {linear_thread(), epoch, warp_epochs[linear_thread() / 32]}; }

size_t offset_in_shared(const void* address, int bytes, const char* what) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(shared_begin);
  const size_t size = bytes_of_shared.size();
  if (at < begin || at + bytes > begin + size)
    fail("%s of %d bytes out of bounds: byte %lld of %zu of shared memory", what, bytes,
         static_cast<long long>(at - begin), size);
  if (at % bytes) fail("misaligned %s of %d bytes: byte %zu of shared memory", what, bytes, at - begin);
  return at - begin;
}

void check_write(Byte& b, size_t at) {
  if (b.in_flight != kNobody)
    fail("byte %zu of shared memory is written while thread %d copies to it", at, b.in_flight);
  if (!is_ordered_after(b.write))
    fail("missing barrier: byte %zu of shared memory was written by thread %d", at, b.write.thread);
  if (!is_ordered_after(b.read)) {
    if (b.read.thread == kSeveral) fail("missing barrier: byte %zu of shared memory was read by several threads", at);
    fail("missing barrier: byte %zu of shared memory was read by thread %d", at, b.read.thread);
  }
}

void note_read(size_t at, int bytes) {
  for (size_t i = at; i < at + bytes; ++i) {
    Byte& b = bytes_of_shared[i];
    if (b.in_flight != kNobody)
      fail("missing cp.async wait: byte %zu of shared memory is read while thread %d copies to it", i, b.in_flight);
    if (!b.written) fail("byte %zu of shared memory is read before anything wrote it", i);
    if (!is_ordered_after(b.write))
      fail("missing barrier: byte %zu of shared memory was written by thread %d", i, b.write.thread);
    const bool other = b.read.epoch == epoch && b.read.thread != kNobody && b.read.thread != linear_thread();
    b.read = now();
    if (other) b.read.thread = kSeveral;
  }
}

void note_write(size_t at, int bytes) {
  for (size_t i = at; i < at + bytes; ++i) {
    Byte& b = bytes_of_shared[i];
    check_write(b, i);
    b.written = true;
    b.write = now();
  }
}

}  // namespace

namespace memory {

void begin_launch(size_t shared_bytes) {
  storage.assign(shared_bytes + 128, 0);
  shared_begin = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(storage.data()) + 127) / 128 * 128);
  bytes_of_shared.resize(shared_bytes);
}

void begin_block(int threads) {
  memset(shared_begin, 0xA5, bytes_of_shared.size());
  std::fill(bytes_of_shared.begin(), bytes_of_shared.end(), Byte{});
  copies.assign(threads, {});
  warp_epochs.assign((threads + 31) / 32, 0);
  epoch = 0;
  published.assign(threads, {});
  if (counting) {
    occurrences.assign(threads, {});
    groups.assign(warp_epochs.size(), {});
  }
}

void end_block() {
  if (!counting) return;
  Counters& c = *emulator_counters();
  for (const auto& warp : groups)
    for (const auto& [key, group] : warp) group.is_shared ? count_shared(group, c) : count_global(group, c);
  groups.clear();
}

void barrier_passed() { ++epoch; }
void warp_synchronised(int warp) { ++warp_epochs[warp]; }
void thread_ended() {
  const Copies& mine = copies[linear_thread()];
  if (!mine.open.empty()) fail("the kernel ends with cp.async copies that were never committed");
  for (const auto& group : mine.groups)
    if (!group.empty()) fail("the kernel ends with cp.async copies that were never waited for");
}

}  // namespace memory

unsigned char* shared_memory() { return shared_begin; }

__attribute__((noinline)) void read_shared(void* to, const void* from, int bytes) {
  count_access(__builtin_return_address(0), true, from, bytes);
  note_read(offset_in_shared(from, bytes, "read"), bytes);
  memcpy(to, from, bytes);
}

__attribute__((noinline)) void write_shared(void* to, const void* from, int bytes) {
  count_access(__builtin_return_address(0), true, to, bytes);
  note_write(offset_in_shared(to, bytes, "write"), bytes);
  memcpy(to, from, bytes);
}

static void check_global(const void* address, int bytes, GlobalAccess kind) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const char* what = kind == kWrite ? "write" : "read";
  const auto buffer = std::find_if(buffers.begin(), buffers.end(),
                                   [=](const Buffer& b) { return b.begin <= at && at + bytes <= b.end; });
  if (buffer == buffers.end()) {
    const auto distance = [=](const Buffer& b) { return b.end <= at ? at - b.end : b.begin - at; };
    const auto nearest = std::min_element(buffers.begin(), buffers.end(),
                                          [&](const Buffer& a, const Buffer& b) { return distance(a) < distance(b); });
    if (nearest == buffers.end()) fail("%s of %d bytes out of bounds: the launch has no buffers", what, bytes);
    fail("%s of %d bytes out of bounds: byte %lld of a buffer of %lld", what, bytes,
         static_cast<long long>(at - nearest->begin), static_cast<long long>(nearest->end - nearest->begin));
  }
  if (kind == kWrite && !buffer->writable) fail("write of %d bytes to an operand that is only read", bytes);
  if (kind == kReadOnly && buffer->writable)
    fail("read of %d bytes through the read-only path from memory that this kernel writes", bytes);
}

__attribute__((noinline)) void access_global(const void* address, int bytes, GlobalAccess kind) {
  count_access(__builtin_return_address(0), false, address, bytes);
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("misaligned %s of %d bytes in global memory", kind == kWrite ? "write" : "read", bytes);
  check_global(address, bytes, kind);
  if (kind == kWrite) published[linear_thread()] = {true, false, epoch};
}

void fence() {
  for (int t = 0; t < static_cast<int>(published.size()); ++t)
    if (t == linear_thread() || published[t].epoch < epoch) published[t].fenced = true;
}

void access_atomic(void* address, int bytes) {
  for (int t = 0; t < static_cast<int>(published.size()); ++t) {
    if (!published[t].wrote) continue;
    if (!published[t].fenced) fail("missing __threadfence: an atomic tells other blocks of writes of thread %d", t);
    if (t != linear_thread() && published[t].epoch == epoch)
      fail("missing barrier: an atomic tells other blocks of writes of thread %d", t);
  }
  check_global(address, bytes, kWrite);
}

// The bytes are on their way from here to the wait: nobody may read or write them, and whoever read or wrote them
// before must have passed a barrier.
__attribute__((noinline)) void copy_async(void* shared, const void* global, int bytes) {
  count_access(__builtin_return_address(0), true, shared, 16);
  if (bytes < 0 || bytes > 16) fail("cp.async of %d bytes: 0 to 16 are possible", bytes);
  if (reinterpret_cast<uintptr_t>(global) % 16) fail("misaligned cp.async of 16 bytes from global memory");
  if (bytes) {
    count_access(static_cast<char*>(__builtin_return_address(0)) + 1, false, global, bytes);
    check_global(global, bytes, kReadOnly);
  }
  const size_t at = offset_in_shared(shared, 16, "cp.async");
  for (size_t i = at; i < at + 16; ++i) {
    check_write(bytes_of_shared[i], i);
    bytes_of_shared[i].in_flight = linear_thread();
  }
  copies[linear_thread()].open.push_back({static_cast<unsigned char*>(shared), global, bytes});
}

void commit_async() {
  Copies& mine = copies[linear_thread()];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait_async(int pending) {
  Copies& mine = copies[linear_thread()];
  while (static_cast<int>(mine.groups.size()) > pending) {
    for (const Copy& c : mine.groups.front()) {
      memcpy(c.to, c.from, c.bytes);
      memset(c.to + c.bytes, 0, 16 - c.bytes);
      for (Byte* b = &bytes_of_shared[c.to - shared_begin]; b < &bytes_of_shared[c.to - shared_begin] + 16; ++b) {
        b->in_flight = kNobody;
        b->written = true;
        b->write = now();
      }
    }
    mine.groups.erase(mine.groups.begin());
  }
}

}  // namespace emulator

extern "C" {
void emulator_forget_buffers() { emulator::buffers.clear(); }
void emulator_add_buffer(uintptr_t begin, size_t bytes, bool writable) {
  emulator::buffers.push_back({begin, begin + bytes, writable});
}
void emulator_count(bool on) {
  if (on) *emulator_counters() = {};
  emulator::counting = on;
}
}
