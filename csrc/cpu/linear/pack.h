// pack_linear: weights in any strided form → panels.
#pragma once
#include "cpu/linear/layout.h"

namespace {

// One column of a panel: the weight row it comes from. data == nullptr past the last column.
struct WeightRow {
  const char* data;
  int64_t k_stride;  // elements
};

inline WeightRow weight_row(const Step& s, bool interleave, int64_t panel, int column) {
  const int weights = s.num_tensors - 1;
  int which = 0;
  int64_t row;
  if (interleave) {
    which = column / kLanes;
    row = panel * kLanes + column % kLanes;
    if (row >= s.t[which].size[0]) return {nullptr, 0};
  } else {
    row = panel * kPanel + column;
    while (which < weights && row >= s.t[which].size[0]) row -= s.t[which++].size[0];
    if (which == weights) return {nullptr, 0};
  }
  const Tensor& w = s.t[which];
  return {w.data + row * w.stride[0] * itemsize(w.dtype), w.stride[1]};
}

inline int64_t packed_columns(const Step& s) {
  int64_t n = 0;
  for (int i = 0; i + 1 < s.num_tensors; ++i) n += s.t[i].size[0];
  return n;
}

// Any strides, one element at a time: k in [k0, k1).
template <class T>
void pack_elements(const WeightRow* rows, DType dtype, int64_t k0, int64_t k1, T* panel) {
  for (int c = 0; c < kPanel; ++c) {
    const T* from = reinterpret_cast<const T*>(rows[c].data);
    for (int64_t k = k0; k < k1; ++k) panel[packed_index(k, c, dtype)] = from ? from[k * rows[c].k_stride] : T{0};
  }
}

// Columns whose k are contiguous: kLanes 32-bit words (one f32 or two halves) of kLanes columns are transposed in
// registers. Returns the first k not packed.
int64_t pack_transposed(const WeightRow* rows, DType dtype, int64_t K, char* panel) {
  const int per_word = dtype == DType::f32 ? 1 : 2;
  const int64_t words = K / per_word / kLanes * kLanes;
  for (int64_t word = 0; word < words; word += kLanes) {
    for (int half = 0; half < 2; ++half) {
      Vec block[kLanes];
      for (int c = 0; c < kLanes; ++c) {
        const char* from = rows[half * kLanes + c].data;
        block[c] = from ? vload(reinterpret_cast<const float*>(from) + word) : vzero();
      }
      vtranspose(block);
      if (dtype != DType::f16) {
        float* to = reinterpret_cast<float*>(panel) + word * kPanel + half * kLanes;
        for (int i = 0; i < kLanes; ++i) vstore(to + i * kPanel, block[i]);
        continue;
      }
      uint16_t* to = reinterpret_cast<uint16_t*>(panel) + 2 * word * kPanel + half * kLanes;
      for (int i = 0; i < kLanes; ++i) {
        uint32_t pair[kLanes];
        vstore(reinterpret_cast<float*>(pair), block[i]);
        for (int c = 0; c < kLanes; ++c) to[2 * i * kPanel + c] = static_cast<uint16_t>(pair[c]);
        for (int c = 0; c < kLanes; ++c) to[(2 * i + 1) * kPanel + c] = static_cast<uint16_t>(pair[c] >> 16);
      }
    }
  }
  return words * per_word;
}

// A whole panel of columns that are neighbours in memory (a transposed view): rows of k are copied.
template <class T>
void pack_copied(const char* first, int64_t k_stride, DType dtype, int64_t K, T* panel) {
  const T* from = reinterpret_cast<const T*>(first);
  if (dtype != DType::bf16) {
    for (int64_t k = 0; k < K; ++k) __builtin_memcpy(panel + k * kPanel, from + k * k_stride, kPanel * sizeof(T));
    return;
  }
  for (int64_t k = 0; k < K; k += 2) {
    const T* even = from + k * k_stride;
    const T* odd = even + k_stride;
    T* to = panel + k * kPanel;
    if (k + 1 < K)
      for (int c = 0; c < kPanel; ++c) to[2 * c] = even[c], to[2 * c + 1] = odd[c];
    else
      for (int c = 0; c < kPanel; ++c) to[2 * c] = even[c], to[2 * c + 1] = T{0};
  }
}

template <class T>
void pack_panel(const WeightRow* rows, DType dtype, int64_t K, char* panel) {
  T* out = reinterpret_cast<T*>(panel);
  bool k_contiguous = true, neighbours = rows[0].data != nullptr;
  for (int c = 0; c < kPanel; ++c) {
    if (rows[c].data && rows[c].k_stride != 1) k_contiguous = false;
    if (rows[c].data != rows[0].data + c * static_cast<int64_t>(sizeof(T)) || rows[c].k_stride != rows[0].k_stride)
      neighbours = false;
  }
  if (neighbours) return pack_copied(rows[0].data, rows[0].k_stride, dtype, K, out);
  const int64_t done = k_contiguous ? pack_transposed(rows, dtype, K, panel) : 0;
  pack_elements(rows, dtype, done, K, out);
  if (padded_k(K, dtype) > K)
    for (int c = 0; c < kPanel; ++c) out[packed_index(K, c, dtype)] = T{0};
}

int one_phase(const Step&, int) { return 1; }

int64_t pack_chunks(const Step& s, int, int) { return ceil_div(packed_columns(s), kPanel); }

void pack_run(const Step& s, int, int64_t panel, int, const Scratch&) {
  const Tensor& w = s.t[0];
  const Tensor& packed = s.t[s.num_tensors - 1];
  const int64_t K = w.size[1];
  WeightRow rows[kPanel];
  for (int c = 0; c < kPanel; ++c) rows[c] = weight_row(s, s.i[0] != 0, panel, c);
  char* to = packed.data + panel * panel_bytes(K, w.dtype);
  if (itemsize(w.dtype) == 4)
    pack_panel<uint32_t>(rows, w.dtype, K, to);
  else
    pack_panel<uint16_t>(rows, w.dtype, K, to);
}

}  // namespace
