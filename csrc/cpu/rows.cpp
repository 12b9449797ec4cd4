// Row kernels: norm, softmax, embedding, index_copy, copy, rope, slide, rotary_table, arange, topk, limit_groups,
// pick, and those of rows/experts.h. Each op's contract heads its file in rows/.
#include "cpu/family.h"
#include "cpu/rows/arange.h"
#include "cpu/rows/copy.h"
#include "cpu/rows/experts.h"
#include "cpu/rows/gather.h"
#include "cpu/rows/norm.h"
#include "cpu/rows/rope.h"
#include "cpu/rows/rotary_table.h"
#include "cpu/rows/slide.h"
#include "cpu/rows/softmax.h"
#include "cpu/rows/topk.h"

namespace {

const Kernel kKernels[] = {
    {"norm", one_phase, norm_chunks, nullptr, norm_run},
    {"softmax", one_phase, softmax_chunks, nullptr, softmax_run},
    {"embedding", one_phase, embedding_chunks, nullptr, embedding_run},
    {"index_copy", one_phase, index_copy_chunks, nullptr, index_copy_run},
    {"copy", one_phase, copy_chunks, nullptr, copy_run},
    {"rope", one_phase, rope_chunks, nullptr, rope_run},
    {"slide", one_phase, slide_chunks, nullptr, slide_run},
    {"rotary_table", one_phase, rotary_table_chunks, nullptr, rotary_table_run},
    {"arange", one_phase, arange_chunks, nullptr, arange_run},
    {"topk", one_phase, topk_chunks, nullptr, topk_run},
    {"limit_groups", one_phase, limit_groups_chunks, nullptr, limit_groups_run},
    {"pick", one_phase, pick_chunks, nullptr, pick_run},
    {"sort_by_expert", one_phase, one_chunk, sort_by_expert_workspace, sort_by_expert_run},
    {"gather_tokens", one_phase, gather_tokens_chunks, nullptr, gather_tokens_run},
    {"combine_experts", one_phase, combine_experts_chunks, nullptr, combine_experts_run},
};

}  // namespace

LLMOPT_EXPORT_FAMILY(rows, kKernels, sizeof(kKernels) / sizeof(kKernels[0]), 0)
