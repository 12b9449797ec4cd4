// The elementwise VM: runs a short register program over blocks of a common iteration space, each value of a block an
// array of fp32 in L1. Programs with row reductions take whole rows as their blocks. vm/bytecode.h has the contract.
#include "cpu/family.h"
#include "cpu/vm/machine.h"

namespace {

inline int64_t vm_chunks(const Step& s, int, int threads) {
  const Blocking b = make_blocking(s, code_of(s));
  return chunk_count(b.blocks, b.elements(), threads);
}

inline bool fits_local(const Code& code, const Blocking& b) { return scratch_bytes(code, b) <= kLocalBytes; }

// Rows too long for the private scratch keep their registers in the shared one, one set for each chunk.
inline size_t vm_workspace(const Step& s, int threads) {
  const Code code = code_of(s);
  const Blocking b = make_blocking(s, code);
  if (fits_local(code, b)) return 0;
  return scratch_bytes(code, b) * static_cast<size_t>(chunk_count(b.blocks, b.elements(), threads));
}

inline void vm_run(const Step& s, int, int64_t chunk, int threads, const Scratch& scratch) {
  const Code code = code_of(s);
  const Blocking b = make_blocking(s, code);
  char* memory = scratch.local;
  if (!fits_local(code, b)) memory = scratch.shared + scratch_bytes(code, b) * static_cast<size_t>(chunk);
  const RowRange blocks = chunk_range(b.blocks, b.elements(), threads, chunk);
  Machine(s, code, b, reinterpret_cast<float*>(memory)).run(blocks.begin, blocks.end);
}

const Kernel kKernels[] = {{"vm", one_phase, vm_chunks, vm_workspace, vm_run}};

}  // namespace

LLMOPT_EXPORT_FAMILY(vm, kKernels, sizeof(kKernels) / sizeof(kKernels[0]), 0)
