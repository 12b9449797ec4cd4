#include "runtime/contracts.h"

#include <utility>

#include "cpu/iteration_space.h"
#include "cpu/vm/bytecode.h"
#include "runtime/operand_checks.h"

namespace llmopt {
namespace {

// cos or sin [B|1, 1, S|1, R] with even R <= D.
bool angles(const Tensor& t, int64_t batch, int64_t positions, int64_t width) {
  return float_rows(t, 4) && one_or(t.size[0], batch) && t.size[1] == 1 && one_or(t.size[2], positions) &&
         t.size[3] % 2 == 0 && t.size[3] <= width;
}

const char* rows_to_write(const Call& c, const Tensor* t) {
  const Tensor &k = t[1], &v = t[2], &k_new = t[8], &v_new = t[9], &positions = t[10];
  for (const auto& [rows, cache] : {std::pair<const Tensor&, const Tensor&>{k_new, k}, {v_new, v}}) {
    if (absent(rows)) continue;
    if (!float_rows(rows, 4) || rows.size[0] != cache.size[0] || rows.size[1] != cache.size[1] ||
        rows.size[3] != head_size(cache))
      return "new keys or values are not like those of the cache";
    if (rows.size[2] > cache.size[2]) return "more new keys or values than the cache holds";
    if (!absent(positions) && (!given(positions, 1) || positions.size[0] != rows.size[2]))
      return "positions are not [Sn]";
  }
  if (!absent(k_new) && !absent(v_new) && k_new.size[2] != v_new.size[2]) return "new keys and values differ in number";
  if (absent(positions)) return nullptr;
  if (positions.dtype != DType::i64) return "positions are not int64";
  return indices_below(c, 10, k.size[2]);
}

// Rows of floats, or of codes with their scale.
bool key_rows(const Tensor& t) {
  if (t.dtype != DType::s8) return float_rows(t, 4);
  return given(t, 4) && t.size[3] > 4 && t.stride[3] == 1;
}

// Codes [B,Hkv,Skv,D+4] beside a cache of floats, and their state [B,Hkv,2] in front of them in memory.
bool is_mirror(const Tensor& cache, const Tensor& codes, const Tensor& state) {
  if (!float_rows(cache, 4) || !key_rows(codes) || codes.dtype != DType::s8) return false;
  for (int d = 0; d < 3; ++d)
    if (codes.size[d] != cache.size[d]) return false;
  if (head_size(codes) != cache.size[3] || state.ndim != 3 || state.dtype != DType::i64) return false;
  const bool dense = state.stride[2] == 1 && state.stride[1] == 2 && state.stride[0] == 2 * state.size[1];
  return state.size[0] == cache.size[0] && state.size[1] == cache.size[1] && state.size[2] == 2 && dense &&
         codes.stride[2] > 0 && codes.data > state.data;
}

const char* mirrors(const Tensor* t) {
  if (absent(t[11]) && absent(t[12]) && absent(t[13]) && absent(t[14])) return nullptr;
  if (!is_mirror(t[1], t[11], t[12]) || !is_mirror(t[2], t[13], t[14]))
    return "the codes beside k and v are not theirs";
  if (!absent(t[10]) && (t[10].ndim != 1 || t[10].dtype != DType::i64)) return "positions are not int64 [Sn]";
  return nullptr;
}

const char* attention(const Call& c) {
  const Step& s = c.step;
  if (s.num_tensors < 4 || s.num_tensors > 16 || s.num_ints < 7 || s.num_floats < 2) return kWrongCount;
  Tensor t[16] = {};  // those past the end of the list are not given
  for (int i = 0; i < s.num_tensors; ++i) t[i] = s.t[i];
  const Tensor &q = t[0], &k = t[1], &v = t[2], &out = t[3], &mask = t[4], &bounds = t[5];
  for (int i = 0; i < 4; ++i) {
    const bool is_key = i == 1 || i == 2;
    if (is_key ? !key_rows(t[i]) : !float_rows(t[i], 4)) return "q, k, v and out are not float [B, H, S, D]";
    if ((is_key ? head_size(t[i]) : t[i].size[3]) > kMaxHeadDim) return "a head is longer than 512";
  }
  const int64_t batch = q.size[0], heads = q.size[1], queries = q.size[2], keys = k.size[2], kv_heads = k.size[1];
  if (k.size[0] != batch || head_size(k) != q.size[3]) return "q and k differ in batch or head size";
  if (v.size[0] != batch || v.size[1] != kv_heads || v.size[2] != keys)
    return "k and v differ in batch, heads or length";
  if (kv_heads ? heads % kv_heads != 0 : heads != 0) return "the heads of q are not a multiple of those of k";
  if (out.size[0] != batch || out.size[1] != heads || out.size[2] != queries || out.size[3] != head_size(v))
    return "out is not [B, H, Sq, Dv]";
  const bool has_scores = batch > 0 && heads > 0 && queries > 0 && keys > 0;  // what is empty has no memory
  if (absent(mask) != absent(bounds) && has_scores) return "a mask and its bounds come together";
  if (!absent(mask)) {
    if (mask.ndim != 4 || bounds.ndim != 4 || bounds.dtype != DType::i32 || bounds.size[3] != 4)
      return "mask and bounds are not [B, H, Sq, .]";
    for (const Tensor* m : {&mask, &bounds})
      if (!one_or(m->size[0], batch) || !one_or(m->size[1], heads) || !one_or(m->size[2], queries))
        return "mask and bounds are not [B, H, Sq, .]";
    if (mask.size[3] != keys) return "the mask has another number of keys";
    const bool is_mask = is_float(mask.dtype) || mask.dtype == DType::b8 || mask.dtype == DType::u8;
    if (!is_mask || (keys > 1 && mask.stride[3] != 1 && mask.stride[3] != 0))
      return "the mask is not dense bool or float";
  }
  if (s.i[3] < kRopeNone || s.i[3] > kRopeInterleaved) return "there is no such rotary form";
  if (s.i[3] && !absent(t[6]) && !absent(t[7])) {
    const int64_t written = s.i[4] && !absent(t[8]) ? t[8].size[2] : queries;
    for (int i : {6, 7})
      if (!angles(t[i], batch, queries, q.size[3]) || (written != queries && t[i].size[2] != 1))
        return "cos or sin is not float [B, 1, Sq, R]";
    if (t[6].size[3] != t[7].size[3]) return "cos and sin differ in size";
  }
  if (const char* reason = mirrors(t)) return reason;
  const Tensor& sinks = t[15];
  if (!absent(sinks) && (sinks.ndim != 4 || !is_float(sinks.dtype) || !one_or(sinks.size[0], batch) ||
                         !one_or(sinks.size[1], heads) || !one_or(sinks.size[2], queries) || sinks.size[3] != 1))
    return "sinks are not float [B, H, Sq, 1]";
  return s.i[4] ? rows_to_write(c, t) : nullptr;
}

const char* mask_bounds(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 2, 0, 0)) return kWrongCount;
  const Tensor &mask = s.t[0], &bounds = s.t[1];
  if (!given(mask, 4) || !(is_float(mask.dtype) || mask.dtype == DType::b8 || mask.dtype == DType::u8))
    return "the mask is not bool or float [B, H, Sq, Skv]";
  if (mask.size[3] > 1 && mask.stride[3] != 1 && mask.stride[3] != 0) return "the mask's last dimension is not dense";
  if (!given(bounds, 4) || bounds.dtype != DType::i32 || bounds.size[3] != 4 || bounds.stride[3] != 1)
    return "bounds are not int32 [B, H, Sq, 4]";
  for (int d = 0; d < 3; ++d)
    if (!one_or(mask.size[d], bounds.size[d])) return "mask and bounds differ in size";
  return nullptr;
}

const char* norm(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 6, 1, 2)) return kWrongCount;
  const Tensor& y = s.t[4];
  if (s.i[0] != kNormRms && s.i[0] != kNormLayer) return "there is no such norm";
  if (!float_rows(y, 2) || !float_row_groups(s.t[0], y.size[0], y.size[1])) return "x and y are not float [M, K]";
  if (!absent(s.t[1]) && !float_row_groups(s.t[1], y.size[0], y.size[1])) return "residual or sum is not [M, K]";
  if (!absent(s.t[5]) && (!float_rows(s.t[5], 2) || !same_sizes(s.t[5], y))) return "residual or sum is not [M, K]";
  if (!float_vector(s.t[2], y.size[1]) || !float_vector(s.t[3], y.size[1])) return "weight or bias is not float [K]";
  return nullptr;
}

const char* softmax(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 2, 0, 0)) return kWrongCount;
  const bool good = s.t[0].ndim >= 1 && float_rows(s.t[0], s.t[0].ndim) && float_rows(s.t[1], s.t[0].ndim);
  return good && same_sizes(s.t[0], s.t[1]) ? nullptr : "x and y are not float rows of one size";
}

const char* embedding(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 3, 0, 1)) return kWrongCount;
  const Tensor &ids = s.t[0], &table = s.t[1], &y = s.t[2];
  if (!float_rows(table, 2) || !float_rows(y, 2) || table.size[1] != y.size[1] || y.size[0] != positions(ids, ids.ndim))
    return "table and y are not float [V, K] and [M, K]";
  if (table.size[0] == 0 && y.size[0] != 0) return "the table is empty";
  return indices_below(c, 0, table.size[0]);
}

const char* index_copy(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 3, 0, 0)) return kWrongCount;
  const Tensor &y = s.t[0], &index = s.t[1], &x = s.t[2];
  if (!float_rows(y, 4) || !float_rows(x, 4)) return "y and x are not float [B, H, S, D]";
  if (x.size[0] != y.size[0] || x.size[1] != y.size[1] || x.size[3] != y.size[3]) return "y and x differ in size";
  if (!given(index, 1) || index.dtype != DType::i64 || index.size[0] != x.size[2]) return "index is not int64 [Sn]";
  return indices_below(c, 1, y.size[2]);
}

const char* slide(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 2, 0, 0)) return kWrongCount;
  const Tensor &y = s.t[0], &x = s.t[1];
  if (!float_rows(y, 4) || !float_rows(x, 4) || x.dtype != y.dtype) return "y and x are not float [B, H, S, D]";
  if (x.size[0] != y.size[0] || x.size[1] != y.size[1] || x.size[3] != y.size[3]) return "y and x differ in size";
  return x.size[2] >= 1 && x.size[2] <= y.size[2] ? nullptr : "x has no position, or more than y";
}

const char* copy(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 2, 0, 0)) return kWrongCount;
  const Tensor &x = s.t[0], &y = s.t[1];
  if (!given(x, x.ndim) || !given(y, x.ndim) || !same_sizes(x, y)) return "x and y differ in size";
  const bool converts = is_float(x.dtype) && is_float(y.dtype);
  return x.dtype == y.dtype || converts ? nullptr : "x and y differ in dtype";
}

const char* rotary_table(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 4, 0, 1)) return kWrongCount;
  const Tensor &frequencies = s.t[0], &positions = s.t[1], &cos = s.t[2];
  if (!float_rows(frequencies, 3) || frequencies.dtype != DType::f32) return "frequencies are not float32 [B, S, R/2]";
  if (!given(positions, 3) || !same_sizes(positions, frequencies) ||
      (positions.size[2] > 1 && positions.stride[2] != 0))
    return "positions are not [B, S, R/2], the same along a row";
  if (positions.dtype != DType::i64 && positions.dtype != DType::f32) return "positions are not int64 or float32";
  if (!float_rows(cos, 3) || !float_rows(s.t[3], 3) || !same_sizes(cos, s.t[3])) return "cos and sin are not [B, S, R]";
  const bool fits = cos.size[0] == positions.size[0] && cos.size[1] == positions.size[1];
  return fits && cos.size[2] == 2 * positions.size[2] ? nullptr : "cos does not fit the positions";
}

const char* arange(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 1, 2, 0)) return kWrongCount;
  const Tensor& y = s.t[0];
  return given(y, 1) && y.dtype == DType::i64 && (y.size[0] < 2 || y.stride[0] == 1) ? nullptr : "y is not int64 [N]";
}

// Integers one behind the other.
bool dense_ints(const Tensor& t, int64_t n, DType dtype) {
  return given(t, 1) && t.dtype == dtype && t.size[0] == n && (n < 2 || t.stride[0] == 1);
}

const char* sort_by_expert(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 5, 0, 0)) return kWrongCount;
  const Tensor &ids = s.t[0], &ends = s.t[2];
  if (!given(ids, 1) || (ids.dtype != DType::i64 && ids.dtype != DType::i32)) return "ids are not integers [S]";
  if (ids.size[0] > INT32_MAX) return "there are more than 2^31 places";
  const int64_t places = ids.size[0];
  if (!dense_ints(s.t[1], places, DType::i64) || (!absent(s.t[4]) && !dense_ints(s.t[4], places, DType::i64)))
    return "order and inverse are not int64 [S]";
  if (ends.ndim != 1 || !dense_ints(ends, ends.size[0], DType::i32)) return "ends are not int32 [E]";
  if (!absent(s.t[3]) && !dense_ints(s.t[3], places, ids.dtype)) return "sorted ids are not like ids";
  return nullptr;
}

// Rows [M, k], each dense.
bool is_picked(const Tensor& t, int64_t rows, int64_t k) {
  return given(t, 2) && t.size[0] == rows && t.size[1] == k && (k < 2 || t.stride[1] == 1);
}

const char* topk(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 3, 1, 0)) return kWrongCount;
  const Tensor &x = s.t[0], &values = s.t[1], &indices = s.t[2];
  const int64_t k = s.i[0];
  if (!float_rows(x, 2)) return "x is not float [M, N]";
  if (k < 1 || k > x.size[1] || k > kMostPlaces) return "k is not 1 to 64, or more than there are";
  if (!absent(values) && (!is_picked(values, x.size[0], k) || values.dtype != x.dtype))
    return "values are not [M, k] of x's dtype";
  if (!absent(indices) && (!is_picked(indices, x.size[0], k) || indices.dtype != DType::i64))
    return "indices are not int64 [M, k]";
  return nullptr;
}

const char* limit_groups(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 2, 3, 1)) return kWrongCount;
  const Tensor &x = s.t[0], &y = s.t[1];
  const int64_t groups = s.i[0], best = s.i[1], kept = s.i[2];
  if (!float_rows(x, 2) || !float_rows(y, 2) || !same_sizes(x, y) || x.dtype != DType::f32 || y.dtype != DType::f32)
    return "x and y are not f32 [M, N]";
  if (groups < 1 || groups > kMostPlaces || x.size[1] % groups != 0) return "groups are not 1 to 64, each as wide";
  if (best < 1 || best > kMostPlaces || best > x.size[1] / groups) return "a group has fewer numbers than it counts as";
  return kept < 1 || kept > groups ? "there are fewer groups than are kept" : nullptr;
}

const char* pick(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 3, 0, 0)) return kWrongCount;
  const Tensor &x = s.t[0], &indices = s.t[1], &y = s.t[2];
  if (!float_rows(x, 2) || y.dtype != x.dtype || y.ndim != 2) return "x and y are not float [M, N] and [M, k]";
  if (!is_picked(y, x.size[0], y.size[1])) return "x and y are not float [M, N] and [M, k]";
  if (!is_picked(indices, y.size[0], y.size[1]) || indices.dtype != DType::i64) return "indices are not int64 [M, k]";
  return x.size[1] == 0 && y.size[1] != 0 ? "there are no columns" : nullptr;
}

const char* gather_tokens(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 3, 1, 0)) return kWrongCount;
  const Tensor &x = s.t[0], &order = s.t[1], &y = s.t[2];
  if (s.i[0] < 1) return "a token has no place";
  if (!float_rows(x, 2) || !float_rows(y, 2) || x.size[1] != y.size[1])
    return "x and y are not float [T, H] and [S, H]";
  if (!given(order, 1) || order.dtype != DType::i64 || order.size[0] != y.size[0]) return "order is not int64 [S]";
  return x.size[0] == 0 && y.size[0] != 0 ? "there are no tokens" : nullptr;
}

const char* combine_experts(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 4, 0, 0)) return kWrongCount;
  const Tensor &x = s.t[0], &inverse = s.t[1], &weights = s.t[2], &y = s.t[3];
  if (!float_rows(x, 2) || !float_rows(y, 2) || x.size[1] != y.size[1])
    return "x and y are not float [S, H] and [T, H]";
  if (!given(weights, 2) || !is_float(weights.dtype) || weights.size[0] != y.size[0])
    return "weights are not float [T, k]";
  if (weights.size[1] > kMostPlaces) return "a token has more than 64 experts";
  const int64_t places = weights.size[0] * weights.size[1];
  if (!given(inverse, 1) || inverse.dtype != DType::i64 || inverse.size[0] != places) return "inverse is not int64 [S]";
  return x.size[0] == 0 && places != 0 ? "there are no rows" : nullptr;
}

const char* rope(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 4, 1, 0)) return kWrongCount;
  if (s.i[0] != kRopeHalf && s.i[0] != kRopeInterleaved) return "there is no such rotary form";
  const Tensor& x = s.t[0];
  if (!float_rows(x, 4) || !float_rows(s.t[3], 4) || !same_sizes(x, s.t[3]))
    return "x and y are not float [B, H, S, D]";
  for (int i : {1, 2})
    if (!angles(s.t[i], x.size[0], x.size[2], x.size[3])) return "cos or sin is not float [B, 1, S, R]";
  return s.t[1].size[3] == s.t[2].size[3] ? nullptr : "cos and sin differ in size";
}

bool known(int op) {
  return (op >= kCopy && op < kUnaryEnd) || (op >= kAdd && op < kBinaryEnd) || (op >= kWhere && op < kTernaryEnd) ||
         (op >= kSum && op < kReduceEnd);
}

// Which registers hold a value after the instructions so far; constants always do.
struct Written {
  bool is[512] = {};
};

const char* vm_word(const Code& code, const Instruction& in, Written& written) {
  if (in.op == kLoad) {
    if (in.a >= code.inputs || in.dst >= code.registers) return "a load names what does not exist";
    written.is[in.dst] = true;
    return nullptr;
  }
  if (in.op == kStore) return in.b < code.outputs && written.is[in.a] ? nullptr : "a store names what does not exist";
  if (!known(in.op)) return "there is no such instruction";
  if (in.dst >= code.registers || !written.is[in.a] || !written.is[in.b] || !written.is[in.c] ||
      in.extra > code.outputs)
    return "an instruction names what does not exist";
  if (in.op >= kSum && !code.has_reduction) return "a reduction was not announced";
  written.is[in.dst] = true;
  return nullptr;
}

const char* vm(const Call& c) {
  const Step& s = c.step;
  if (s.num_ints < 4) return kWrongCount;
  const Code code = code_of(s);
  if (code.inputs < 0 || code.outputs < 1 || code.registers < 0 || code.registers + code.num_constants > 256 ||
      code.inputs + code.outputs != s.num_tensors || s.num_tensors > kMaxSpaceTensors)
    return kWrongCount;
  for (int i = 0; i < s.num_tensors; ++i) {
    if (!given(s.t[i], s.t[0].ndim) || !same_sizes(s.t[i], s.t[0])) return "operands differ in size";
    if (i >= code.inputs && !is_float(s.t[i].dtype) && s.t[i].dtype != DType::b8)
      return "an output is not float or bool";
  }
  Written written;
  for (int k = 0; k < code.num_constants; ++k) written.is[code.registers + k] = true;
  for (int i = 0; i < code.length; ++i)
    if (const char* reason = vm_word(code, decode(code.words[i]), written)) return reason;
  return nullptr;
}

constexpr ContractOf kContracts[] = {
    {"sort_by_expert", {sort_by_expert, false}},
    {"topk", {topk, false}},
    {"limit_groups", {limit_groups, false}},
    {"pick", {pick, false}},
    {"gather_tokens", {gather_tokens, false}},
    {"combine_experts", {combine_experts, false}},
    {"attention", {attention, true}},
    {"mask_bounds", {mask_bounds, false}},
    {"norm", {norm, false}},
    {"softmax", {softmax, false}},
    {"embedding", {embedding, true}},
    {"index_copy", {index_copy, true}},
    {"copy", {copy, false}},
    {"rope", {rope, false}},
    {"slide", {slide, false}},
    {"rotary_table", {rotary_table, false}},
    {"arange", {arange, false}},
    {"vm", {vm, false}},
};

}  // namespace

const char* const kIndexRange = "an index is out of range";

Contract contract_of(const char* op) {
  const Contract own = find_contract(kContracts, op);
  return own.reason ? own : linear_contract_of(op);
}

}  // namespace llmopt
