#include "runtime/contracts.h"

#include <cstring>
#include <utility>

#include "cpu/iteration_space.h"
#include "cpu/vm/bytecode.h"
#include "runtime/tuning_contract.h"

namespace llmopt {
namespace {

bool is_float(DType d) { return d == DType::f32 || d == DType::f16 || d == DType::bf16; }

// Whether an operand of so many dimensions is there; one without elements needs no memory.
bool given(const Tensor& t, int ndim) {
  if (t.ndim != ndim) return false;
  for (int d = 0; d < ndim; ++d)
    if (t.size[d] == 0) return true;
  return t.data != nullptr;
}
bool absent(const Tensor& t) { return t.data == nullptr; }

bool float_rows(const Tensor& t, int ndim) {
  return given(t, ndim) && is_float(t.dtype) && (t.size[ndim - 1] <= 1 || t.stride[ndim - 1] == 1);
}
bool float_vector(const Tensor& t, int64_t n) { return absent(t) || (float_rows(t, 1) && t.size[0] == n); }
bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.size[d] != b.size[d]) return false;
  return true;
}
bool one_or(int64_t size, int64_t n) { return size == 1 || size == n; }
bool has(const Step& s, int tensors, int ints, int floats) {
  return s.num_tensors == tensors && s.num_ints >= ints && s.num_floats >= floats;
}

// Elements of the first n dimensions, whose order is that of the rows behind them.
int64_t positions(const Tensor& t, int n) {
  int64_t count = 1;
  for (int d = 0; d < n; ++d) count *= t.size[d];
  return count;
}

// Rows of floats with any dimensions in front: [..., K].
bool float_row_groups(const Tensor& t, int64_t rows, int64_t width) {
  return t.ndim >= 1 && float_rows(t, t.ndim) && t.size[t.ndim - 1] == width && positions(t, t.ndim - 1) == rows;
}

// nullptr when every index [...] i64 or i32 is below `limit`. Content can be looked at only where it exists already.
const char* indices_below(const Call& c, int operand, int64_t limit) {
  const Tensor& t = c.step.t[operand];
  if (!given(t, t.ndim) || (t.dtype != DType::i64 && t.dtype != DType::i32)) return "indices are not integers";
  if (!c.is_external[operand]) return "indices are made by the program itself, where they cannot be checked";
  const int64_t count = positions(t, t.ndim);
  for (int64_t m = 0; m < count; ++m) {
    const int64_t i = position_offset(t, t.ndim, m);
    const int64_t index = t.dtype == DType::i32 ? reinterpret_cast<const int32_t*>(t.data)[i]
                                                : reinterpret_cast<const int64_t*>(t.data)[i];
    if (index < 0 || index >= limit) {
      *c.fault = {index, limit};
      return kIndexRange;
    }
  }
  return nullptr;
}

constexpr const char* kWrongCount = "takes another number of operands or attributes";

const char* pack_linear(const Call& c) {
  const Step& s = c.step;
  if (s.num_tensors < 2 || s.num_ints < 1) return kWrongCount;
  const int weights = s.num_tensors - 1;
  const Tensor &first = s.t[0], &packed = s.t[weights];
  int64_t columns = 0;
  for (int i = 0; i < weights; ++i) {
    const Tensor& w = s.t[i];
    if (!given(w, 2) || !is_float(w.dtype)) return "a weight is not a float matrix";
    if (w.dtype != first.dtype || w.size[1] != first.size[1]) return "the weights differ in K or dtype";
    columns += w.size[0];
  }
  if (s.i[0] && (weights != 2 || s.t[1].size[0] != first.size[0])) return "only two weights of equal N interleave";
  const int64_t panels = (columns + c.panel_width - 1) / c.panel_width, k = first.size[1] + first.size[1] % 2;
  const int64_t padded = first.dtype == DType::bf16 ? k : first.size[1];
  if (!given(packed, 1) || packed.size[0] < panels * c.panel_width * padded * itemsize(first.dtype))
    return "the packed form does not fit its memory";
  return nullptr;
}

// What linear and linear_quantized share: everything but the packed weight.
const char* around_weight(const Step& s) {
  const Tensor &x = s.t[0], &residual = s.t[3], &y = s.t[4];
  const int64_t n = s.i[0], k = s.i[1], outputs = s.i[4] ? n / 2 : n;
  if (n < 0 || k < 0 || (s.i[4] && n % 2)) return "N and K are not sizes of a weight";
  if (s.i[3] < 0 || s.i[3] > kActRelu2) return "there is no such activation";
  if (s.i[5] < kNormNone || s.i[5] > kNormLayer) return "there is no such norm";
  if (!float_rows(x, 2) || x.size[1] != k) return "x is not float [M, K]";
  if (!float_rows(y, 2) || y.size[0] != x.size[0] || y.size[1] != outputs) return "y is not float [M, N]";
  if (absent(s.t[1])) return "there is no packed weight";
  if (!float_vector(s.t[2], n)) return "bias is not float [N]";
  if (!absent(residual) && (!float_rows(residual, 2) || !same_sizes(residual, y)))
    return "residual is not float [M, N]";
  if (!float_vector(s.t[5], k) || !float_vector(s.t[6], k)) return "norm weight or bias is not float [K]";
  return nullptr;
}

const char* linear(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 7, kLinearInts, 3)) return kWrongCount;
  if (!is_float(static_cast<DType>(s.i[2])) || absent(s.t[1])) return "there is no packed float weight";
  if (const char* reason = around_weight(s)) return reason;
  return refuse_tuning("linear", c);
}

// Bytes of quantised weights [N, K] in the layout of csrc/cpu/linear_quantized/layout.h.
int64_t quantized_bytes(int64_t n, int64_t k, int64_t bits, int64_t group, bool offsets, int64_t panel) {
  const int64_t scales = panel * (bits == 8 ? 4 : 2) * (offsets ? 2 : 1);
  const int64_t each = (group + 7) / 8 * panel * bits + scales;
  return (n + panel - 1) / panel * (k / group * each + (bits == 8 ? 0 : 4 * panel));
}

constexpr int64_t kMaxGroup = 1 << 16;  // products of signed and unsigned bytes that an int32 sum holds

const char* quantized_form(int64_t k, int64_t bits, int64_t group) {
  if (bits != 8 && bits != 4) return "codes have 8 or 4 bits";
  if (group < 1 || group > kMaxGroup || k % group) return "the groups do not divide K, or are longer than 65536";
  return bits == 4 && group % 2 ? "a group of 4-bit codes is odd" : nullptr;
}

const char* pack_linear_quantized(const Call& c) {
  const Step& s = c.step;
  if (s.num_tensors < 4 || s.num_tensors % 3 != 1 || s.num_ints < 3) return kWrongCount;
  const int weights = s.num_tensors / 3;
  const int64_t bits = s.i[0], group = s.i[1];
  if (s.t[0].ndim != 2) return "codes are not a matrix";
  const int64_t k = s.t[0].size[1] * (bits == 4 ? 2 : 1);
  if (const char* reason = quantized_form(k, bits, group)) return reason;
  int64_t columns = 0;
  for (int i = 0; i < weights; ++i) {
    const Tensor &codes = s.t[3 * i], &scales = s.t[3 * i + 1], &offsets = s.t[3 * i + 2];
    if (!given(codes, 2) || codes.dtype != (bits == 8 ? DType::s8 : DType::u8)) return "codes are not bytes [N, K]";
    if (codes.size[1] != s.t[0].size[1]) return "the weights differ in K";
    if (absent(offsets) != absent(s.t[2])) return "all weights have offsets or none has";
    for (const Tensor* t : {&scales, &offsets}) {
      if (t == &offsets && absent(offsets)) continue;
      if (!given(*t, 2) || t->dtype != DType::f32 || t->size[0] != codes.size[0] || t->size[1] != k / group)
        return "scales or offsets are not float32 [N, K / group]";
    }
    columns += codes.size[0];
  }
  if (s.i[2] && (weights != 2 || s.t[3].size[0] != s.t[0].size[0])) return "only two weights of equal N interleave";
  const Tensor& packed = s.t[s.num_tensors - 1];
  const int64_t wanted = quantized_bytes(columns, k, bits, group, !absent(s.t[2]), c.panel_width);
  return given(packed, 1) && packed.size[0] >= wanted ? nullptr : "the packed form does not fit its memory";
}

const char* linear_quantized(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 7, kLinearQuantizedInts, 3)) return kWrongCount;
  if (static_cast<DType>(s.i[2]) != DType::u8) return "packed codes are u8";
  if (s.i[9] < 1 || s.i[9] > 3) return "there are 1 to 3 planes";
  if (const char* reason = quantized_form(s.i[1], s.i[6], s.i[7])) return reason;
  if (const char* reason = around_weight(s)) return reason;
  return refuse_tuning("linear_quantized", c);
}

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

const struct {
  const char* op;
  Contract contract;
} kContracts[] = {
    {"pack_linear", {pack_linear, false}},
    {"linear", {linear, false}},
    {"pack_linear_quantized", {pack_linear_quantized, false}},
    {"linear_quantized", {linear_quantized, false}},
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

const char* refuse_tuning(const char* op, const Call& c) {
  const Step& s = c.step;
  if (std::strcmp(op, "linear") == 0)
    return s.num_ints < kLinearInts
               ? kWrongCount
               : each_tuning(c, kLinearInts, [&](const LinearTuning& t) { return float_tuning(c, t); });
  if (std::strcmp(op, "linear_quantized") != 0) return "has nothing to tune";
  if (s.num_ints < kLinearQuantizedInts) return kWrongCount;
  if (const char* reason = quantized_form(s.i[1], s.i[6], s.i[7])) return reason;
  const int64_t wide = quantized_bytes(c.panel_width, s.i[1], 8, s.i[7], s.i[8] != 0, c.panel_width);
  return each_tuning(c, kLinearQuantizedInts, [&](const LinearTuning& t) { return quantized_tuning(c, t, wide); });
}

Contract contract_of(const char* op) {
  for (const auto& row : kContracts)
    if (std::strcmp(row.op, op) == 0) return row.contract;
  return {};
}

}  // namespace llmopt
