// Contracts of the linear families: weights that are packed, and products with them.
#include <cstring>

#include "runtime/operand_checks.h"
#include "runtime/tuning_contract.h"

namespace llmopt {
namespace {

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
const char* around_weight(const Step& s, const Tensor& bias) {
  const Tensor &x = s.t[0], &residual = s.t[3], &y = s.t[4];
  const int64_t n = s.i[0], k = s.i[1], outputs = s.i[4] ? n / 2 : n;
  if (n < 0 || k < 0 || (s.i[4] && n % 2)) return "N and K are not sizes of a weight";
  if (s.i[3] < 0 || s.i[3] > kActRelu2) return "there is no such activation";
  if (s.i[5] < kNormNone || s.i[5] > kNormLayer) return "there is no such norm";
  if (!float_rows(x, 2) || x.size[1] != k) return "x is not float [M, K]";
  if (!float_rows(y, 2) || y.size[0] != x.size[0] || y.size[1] != outputs) return "y is not float [M, N]";
  if (absent(s.t[1])) return "there is no packed weight";
  if (!float_vector(bias, n)) return "bias is not float [N]";
  if (!absent(residual) && (!float_rows(residual, 2) || !same_sizes(residual, y)))
    return "residual is not float [M, N]";
  if (!float_vector(s.t[5], k) || !float_vector(s.t[6], k)) return "norm weight or bias is not float [K]";
  return nullptr;
}

const char* linear(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 7, kLinearInts, 3)) return kWrongCount;
  if (!is_float(static_cast<DType>(s.i[2])) || absent(s.t[1])) return "there is no packed float weight";
  if (const char* reason = around_weight(s, s.t[2])) return reason;
  return refuse_tuning("linear", c);
}

// What grouped ops have other than the linear of each of their experts.
const char* experts(const Step& s, int own_ints) {
  if (s.num_tensors != kLinearOperands + 2 || s.num_ints != own_ints || s.num_floats < 3) return kWrongCount;
  const Tensor &bias = s.t[2], &ends = s.t[7], &table = s.t[8];
  if (!absent(s.t[3]) || !absent(s.t[5]) || !absent(s.t[6]) || s.i[5] != kNormNone)
    return "experts have no residual and no norm";
  if (!given(ends, 1) || ends.dtype != DType::i32) return "ends are not int32 [E]";
  if (!given(table, 2) || table.dtype != DType::i64 || table.size[0] < ends.size[0] + 2 ||
      table.size[1] != kExpertRowInts || table.stride[0] != kExpertRowInts || table.stride[1] != 1)
    return "the table is not int64 [E + 2, 6]";
  if (!absent(bias) && (!float_rows(bias, 2) || bias.size[0] != ends.size[0])) return "bias is not float [E, N]";
  Tensor own = bias;
  own.ndim = 1, own.size[0] = bias.size[1], own.stride[0] = bias.stride[1];
  return around_weight(s, own);
}

const char* grouped_linear(const Call& c) {
  if (const char* reason = experts(c.step, kLinearInts)) return reason;
  return is_float(static_cast<DType>(c.step.i[2])) ? nullptr : "there is no packed float weight";
}

const char* matmul(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 4, 0, 0)) return kWrongCount;
  const Tensor &x = s.t[0], &w = s.t[1], &y = s.t[3];
  const int rows = y.ndim - 2, columns = y.ndim - 1;
  if (rows < 0 || !float_rows(y, y.ndim)) return "y is not float [batch.., M, N]";
  if (!float_rows(x, y.ndim) || x.size[rows] != y.size[rows]) return "x is not float [batch.., M, K]";
  if (!given(w, y.ndim) || !is_float(w.dtype) || w.size[rows] != y.size[columns] || w.size[columns] != x.size[columns])
    return "w is not float [batch.., N, K]";
  if (!float_vector(s.t[2], y.size[columns])) return "bias is not float [N]";
  for (int d = 0; d < rows; ++d)
    if (x.size[d] != y.size[d] || w.size[d] != y.size[d]) return "the batches differ";
  return nullptr;
}

// Bytes of quantised weights [N, K] in the layout of csrc/cpu/linear_quantized/layout.h.
int64_t quantized_bytes(int64_t n, int64_t k, int64_t bits, int64_t group, bool offsets, int64_t panel) {
  const int64_t scales = panel * (bits == 8 ? 4 : 2) * (offsets ? 2 : 1);
  const int64_t each = (group + 7) / 8 * panel * bits + scales;
  return (n + panel - 1) / panel * (k / group * each + (bits == 8 ? 0 : 4 * panel));
}

constexpr int64_t kMaxGroup = 1 << 16;  // products of signed and unsigned bytes that an int32 sum holds

// As many groups as a vector has lanes are floats in the scratch memory of a thread while they are rounded.
constexpr int64_t kMaxRoundedGroup = int64_t(kLocalBytes) / (4 * 16);

const char* quantized_form(int64_t k, int64_t bits, int64_t group, int64_t longest = kMaxGroup) {
  if (bits != 8 && bits != 4) return "codes have 8 or 4 bits";
  if (group < 1 || group > longest || k % group) return "the groups do not divide K, or are longer than is possible";
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

// Rows one behind the other, and their elements.
bool dense_rows(const Tensor& t, int64_t rows, int64_t width, DType dtype) {
  const bool dense = (rows < 2 || t.stride[0] == width) && (width < 2 || t.stride[1] == 1);
  return given(t, 2) && t.dtype == dtype && t.size[0] == rows && t.size[1] == width && dense;
}

const char* round_weight(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 5, 2, 0)) return kWrongCount;
  const Tensor &w = s.t[0], &offsets = s.t[3], &exact = s.t[4];
  if (!float_rows(w, 2)) return "w is not float [N, K]";
  const int64_t rows = w.size[0], k = w.size[1], bits = s.i[0], group = s.i[1];
  if (const char* reason = quantized_form(k, bits, group, kMaxRoundedGroup)) return reason;
  if (!dense_rows(s.t[1], rows, k * bits / 8, bits == 8 ? DType::s8 : DType::u8)) return "codes are not bytes [N, K]";
  if (!dense_rows(s.t[2], rows, k / group, DType::f32) ||
      (!absent(offsets) && !dense_rows(offsets, rows, k / group, DType::f32)))
    return "scales or offsets are not float32 [N, K / group]";
  if (!absent(exact) && (!given(exact, 1) || exact.dtype != DType::u8 || exact.size[0] != 1))
    return "what becomes 0 where codes are not exact is no byte";
  return nullptr;
}

const char* quantized_ints(const Step& s) {
  if (static_cast<DType>(s.i[2]) != DType::u8) return "packed codes are u8";
  if (s.i[9] < 1 || s.i[9] > 3) return "there are 1 to 3 planes";
  if (s.i[10] && (s.i[9] != 3 || s.i[7] % 8)) return "exact products are of three planes, in groups of a multiple of 8";
  return quantized_form(s.i[1], s.i[6], s.i[7]);
}

const char* linear_quantized(const Call& c) {
  const Step& s = c.step;
  if (!has(s, 7, kLinearQuantizedInts, 3)) return kWrongCount;
  if (const char* reason = quantized_ints(s)) return reason;
  if (const char* reason = around_weight(s, s.t[2])) return reason;
  return refuse_tuning("linear_quantized", c);
}

const char* grouped_linear_quantized(const Call& c) {
  const char* reason = experts(c.step, kLinearQuantizedInts);
  return reason ? reason : quantized_ints(c.step);
}

constexpr ContractOf kContracts[] = {
    {"pack_linear", {pack_linear, false}},           {"linear", {linear, false}},
    {"grouped_linear", {grouped_linear, false}},     {"matmul", {matmul, false}},
    {"round_weight", {round_weight, false}},         {"pack_linear_quantized", {pack_linear_quantized, false}},
    {"linear_quantized", {linear_quantized, false}}, {"grouped_linear_quantized", {grouped_linear_quantized, false}},
};

}  // namespace

Contract linear_contract_of(const char* op) { return find_contract(kContracts, op); }

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

}  // namespace llmopt
