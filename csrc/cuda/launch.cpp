// The C ABI: every function checks its problem, chooses a kernel and launches it on a stream. It returns null, or why
// nothing was launched (valid until this thread's next call).
#include <string>

#include "cuda/driver.h"
#include "cuda/problems.h"
#include "cuda/tiles.h"

#define LLMOPT_API extern "C" __attribute__((visibility("default")))

namespace llmopt::cuda {
namespace {

// A launch as whoever repeats it needs it; its only parameter is the record.
struct Prepared {
  void* function;
  uint32_t grid[3];
  int32_t threads, shared_bytes;
};

const char* answer(std::string error) {
  thread_local std::string last;
  last = std::move(error);
  return last.empty() ? nullptr : last.c_str();
}

bool is_aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// "f16" or "bf16" in kernel names; null for what linears do not compute in.
const char* dtype_name(int32_t dtype) {
  return dtype == static_cast<int32_t>(DType::f16)    ? "f16"
         : dtype == static_cast<int32_t>(DType::bf16) ? "bf16"
                                                      : nullptr;
}

int tokens_of_kernel(int m) { return m <= 1 ? 1 : m <= 2 ? 2 : m <= 4 ? 4 : 8; }

constexpr int kChannelsOfBlock = kGemvWarps * kGemvChannels;
constexpr int kLargestGridY = 65535;

// What every linear asks of its problem.
template <class Problem>
std::string check_linear(const Problem& p) {
  if (!p.y || !p.x) return "x and y must be given";
  if (p.m < 0 || p.n < 0 || p.k < 0) return "sizes must not be negative";
  if (!dtype_name(p.dtype)) return "dtype " + std::to_string(p.dtype) + ": f16 and bf16 are possible";
  if (p.act < kActNone || p.act > kActRelu2) return "activation " + std::to_string(p.act) + " is not in the kernel";
  if (!is_aligned(p.x, 16)) return "x must begin at a multiple of 16 bytes";
  if (!is_aligned(p.y, 2) || !is_aligned(p.bias, 2) || !is_aligned(p.residual, 2))
    return "y, bias and residual must be aligned";
  if (p.y_stride < p.n || (p.residual && p.residual_stride < p.n)) return "rows of y and residual must not overlap";
  return "";
}

std::string check(const LinearW8A8& p) {
  if (std::string e = check_linear(p); !e.empty()) return e;
  if (!p.w || !p.x_scale || !p.w_scale) return "w, x_scale and w_scale must be given";
  if (!is_aligned(p.w, 16) || p.x_stride % 16 || p.w_stride % 16)
    return "rows of x and w must begin at multiples of 16 bytes";
  const int64_t readable = ceil_div(p.k, 16) * 16;
  if (p.x_stride < readable || p.w_stride < readable) return "rows of x and w must hold K rounded up to 16 elements";
  if (p.k > 131071) return "K = " + std::to_string(p.k) + ": up to 131071 products fit an int32 sum";
  return "";
}

std::string check(const LinearW4A16& p) {
  if (std::string e = check_linear(p); !e.empty()) return e;
  if (!p.codes || !p.scale) return "codes and scale must be given";
  if (!is_aligned(p.scale, 4) || !is_aligned(p.offset, 4)) return "scale and offset must be aligned";
  if (p.group != 32 && p.group != 64 && p.group != 128)
    return "groups of " + std::to_string(p.group) + ": 32, 64 and 128 are possible";
  if (p.k % p.group)
    return "groups of " + std::to_string(p.group) + " do not divide " + std::to_string(p.k) + " inputs";
  if (!is_aligned(p.codes, 4) || p.x_stride % 8 || p.x_stride < p.k)
    return "rows of x must begin at multiples of 16 bytes, codes at a multiple of 4";
  if (p.m > kGemvMaxTokens)
    return std::to_string(p.m) + " tokens: up to " + std::to_string(kGemvMaxTokens) + " are possible";
  return "";
}

int head_blocks(const AttentionDecode& p) { return ceil_div(p.heads / p.kv_heads, kDecodeMaxHeads); }

std::string check(const AttentionDecode& p) {
  if (!p.q || !p.k || !p.v || !p.o) return "q, k, v and o must be given";
  if (!p.lengths && p.keys < 0) return "without lengths, keys must not be negative";
  if (p.batch < 0 || p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads)
    return std::to_string(p.heads) + " heads over " + std::to_string(p.kv_heads) + " heads of the cache";
  if (p.head_dim != 64 && p.head_dim != 128)
    return "heads of " + std::to_string(p.head_dim) + " dimensions: 64 and 128 are possible";
  const bool is_int8 = p.cache_dtype == static_cast<int32_t>(DType::s8);
  if (!is_int8 && p.cache_dtype != static_cast<int32_t>(DType::f16))
    return "a cache of dtype " + std::to_string(p.cache_dtype) + ": f16 and s8 are possible";
  if (is_int8 && (!p.k_scale || !p.v_scale)) return "an s8 cache needs k_scale and v_scale";
  if (p.splits < 1) return "splits must be at least 1";
  if (p.splits > 1 && (!p.partial || !p.finished)) return "more than one split needs partial and finished";
  const int alignment = is_int8 ? 8 : 16;
  if (!is_aligned(p.q, 16) || !is_aligned(p.o, 16) || !is_aligned(p.partial, 16) || !is_aligned(p.k, alignment) ||
      !is_aligned(p.v, alignment) || p.batch_stride % 8 || p.head_stride % 8 || p.row_stride % 8)
    return "q, k, v, o, partial and the rows of the cache must begin at multiples of 8 elements";
  if (p.batch > kLargestGridY || p.kv_heads * head_blocks(p) > kLargestGridY)
    return "more sequences or heads than a grid";
  return "";
}

std::string plan(const LinearW8A8& p, Planned* planned) {
  if (std::string e = check(p); !e.empty()) return e;
  if (p.m == 0 || p.n == 0) return "";
  const std::string dtype = dtype_name(p.dtype);
  if (p.m <= kGemvMaxTokens) {
    const std::string name = "linear_w8a8_gemv_" + std::to_string(tokens_of_kernel(p.m)) + "_" + dtype;
    const Grid grid{static_cast<unsigned>(ceil_div(p.n, kChannelsOfBlock)), 1, 1};
    *planned = {"linear_w8a8_gemv", name, grid, 32 * kGemvWarps, 0};
    return "";
  }
  int multiprocessors = 0;
  if (std::string e = driver().multiprocessors(&multiprocessors); !e.empty()) return e;
  const auto blocks = [&](const GemmTile& t) {
    return static_cast<int64_t>(ceil_div(p.m, t.block_m)) * ceil_div(p.n, t.block_n);
  };
  const GemmTile* tile = kGemmTiles;
  while (tile != kGemmTiles + kGemmTileCount - 1 && blocks(*tile) < multiprocessors) ++tile;
  const Grid grid{static_cast<unsigned>(ceil_div(p.m, tile->block_m)),
                  static_cast<unsigned>(ceil_div(p.n, tile->block_n)), 1};
  if (grid.y > kLargestGridY) return "N = " + std::to_string(p.n) + " is more than a grid";
  *planned = {"linear_w8a8_gemm", std::string("linear_w8a8_gemm_") + tile->name + "_" + dtype, grid, tile->threads(),
              tile->shared_bytes()};
  return "";
}

std::string plan(const LinearW4A16& p, Planned* planned) {
  if (std::string e = check(p); !e.empty()) return e;
  if (p.m == 0 || p.n == 0) return "";
  const std::string name = "linear_w4a16_gemv_" + std::to_string(tokens_of_kernel(p.m)) +
                           (p.offset ? "_asymmetric_" : "_symmetric_") + dtype_name(p.dtype);
  const Grid grid{static_cast<unsigned>(ceil_div(p.n, kChannelsOfBlock)), 1, 1};
  *planned = {"linear_w4a16_gemv", name, grid, 32 * kGemvWarps, 0};
  return "";
}

std::string plan(const AttentionDecode& p, Planned* planned) {
  if (std::string e = check(p); !e.empty()) return e;
  if (p.batch == 0) return "";
  const int group = p.heads / p.kv_heads, heads = group == 1 ? 1 : group <= 4 ? 4 : kDecodeMaxHeads;
  const std::string name = "attention_decode_" + std::to_string(p.head_dim) + "_" + std::to_string(heads) +
                           (p.cache_dtype == static_cast<int32_t>(DType::s8) ? "_s8" : "_f16");
  const Grid grid{static_cast<unsigned>(p.splits), static_cast<unsigned>(p.kv_heads * head_blocks(p)),
                  static_cast<unsigned>(p.batch)};
  *planned = {"attention_decode", name, grid, 32 * kDecodeWarps, decode_shared_bytes(heads, p.head_dim)};
  return "";
}

template <class Problem>
std::string launch(const Problem& p, void* stream) {
  Planned planned;
  if (std::string e = plan(p, &planned); !e.empty()) return e;
  return planned.file ? driver().launch(planned, &p, stream) : "";
}

template <class Problem>
std::string prepare(const void* p, Prepared* prepared) {
  Planned planned;
  if (std::string e = plan(*static_cast<const Problem*>(p), &planned); !e.empty()) return e;
  if (!planned.file) return "there is nothing to launch";
  *prepared = {nullptr, {planned.grid.x, planned.grid.y, planned.grid.z}, planned.threads, planned.shared_bytes};
  return driver().prepare(planned, &prepared->function);
}

// Enough splits to give every multiprocessor two blocks, none of fewer than kFewestKeys keys; a guess until measured.
std::string decode_splits(int batch, int heads, int kv_heads, int keys, int* splits) {
  constexpr int kFewestKeys = 128;
  if (batch < 1 || kv_heads < 1 || heads < kv_heads || keys < 0) return "sizes must be positive";
  int multiprocessors = 0;
  if (std::string e = driver().multiprocessors(&multiprocessors); !e.empty()) return e;
  const int64_t blocks = static_cast<int64_t>(batch) * kv_heads * ceil_div(heads / kv_heads, kDecodeMaxHeads);
  const int64_t wanted = (2 * multiprocessors + blocks - 1) / blocks;
  const int most = keys / kFewestKeys > 1 ? keys / kFewestKeys : 1;
  *splits = static_cast<int>(wanted < most ? wanted : most);
  return "";
}

}  // namespace
}  // namespace llmopt::cuda

using namespace llmopt::cuda;

// Opens the driver: a library's name or path.
LLMOPT_API const char* llmopt_cuda_open(const char* name) { return answer(driver().open(name)); }
// Whether the current context's GPU can run the kernels of this build.
LLMOPT_API const char* llmopt_cuda_check() { return answer(driver().check()); }

LLMOPT_API const char* llmopt_cuda_linear_w8a8(const LinearW8A8* p, void* stream) { return answer(launch(*p, stream)); }
LLMOPT_API const char* llmopt_cuda_linear_w4a16(const LinearW4A16* p, void* stream) {
  return answer(launch(*p, stream));
}
LLMOPT_API const char* llmopt_cuda_attention_decode(const AttentionDecode* p, void* stream) {
  return answer(launch(*p, stream));
}
// The launch of a record, counted as in llmopt_cuda_record_bytes, in the current context: for who launches it again and
// again.
LLMOPT_API const char* llmopt_cuda_prepare(int record, const void* p, Prepared* prepared) {
  if (record == 0) return answer(prepare<LinearW8A8>(p, prepared));
  if (record == 1) return answer(prepare<LinearW4A16>(p, prepared));
  if (record == 2) return answer(prepare<AttentionDecode>(p, prepared));
  return answer("record " + std::to_string(record) + ": 0, 1 and 2 are possible");
}
LLMOPT_API const char* llmopt_cuda_decode_splits(int batch, int heads, int kv_heads, int keys, int* splits) {
  return answer(decode_splits(batch, heads, kv_heads, keys, splits));
}

// Sizes of the records, in the order above: a caller compiled or written against other ones is found out.
LLMOPT_API int llmopt_cuda_record_bytes(int record) {
  constexpr int kBytes[] = {sizeof(LinearW8A8), sizeof(LinearW4A16), sizeof(AttentionDecode)};
  return record < 0 || record > 2 ? 0 : kBytes[record];
}
