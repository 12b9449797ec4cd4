// slide: the rows of every head move Sn places down in memory, and x takes the last Sn: a full sliding-window cache
// goes on.
//   y[:,:,j,:] = y[:,:,j+Sn,:] for j < S-Sn, then y[:,:,S-Sn+j,:] = x[:,:,j,:]
//   operands: 0 y [B,H,S,D], 1 x [B,H,Sn,D], same dtype, 1 <= Sn <= S, last dimensions dense; memory that does not
//   overlap
// A head is a chunk, or as many groups of columns as it takes to give every thread some: rows move in order within one.
#pragma once
#include "cpu/rows/gather.h"

namespace {

// Into how many groups of columns a head is cut: none is shorter than 16.
inline int64_t slide_cuts(const Step& s, int threads) {
  const Tensor& y = s.t[0];
  const int64_t heads = max64(y.size[0] * y.size[1], 1);
  return max64(1, min64(ceil_div(2 * int64_t{threads}, heads), y.size[3] / 16));
}

inline int64_t slide_chunks(const Step& s, int, int threads) {
  const Tensor& y = s.t[0];
  return y.size[3] == 0 ? 0 : y.size[0] * y.size[1] * slide_cuts(s, threads);
}

inline void slide_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const Tensor &y = s.t[0], &x = s.t[1];
  const int64_t cuts = slide_cuts(s, threads), head = chunk / cuts, cut = chunk % cuts;
  const int64_t b = head / y.size[1], h = head % y.size[1];
  const int64_t begin = y.size[3] * cut / cuts, width = y.size[3] * (cut + 1) / cuts - begin;
  const int64_t kept = y.size[2] - x.size[2];
  const auto row = [&](const Tensor& t, int64_t j) {
    return at(t, b * t.stride[0] + h * t.stride[1] + j * t.stride[2] + begin);
  };
  for (int64_t j = 0; j < kept; ++j) copy_row(y.dtype, row(y, j + x.size[2]), y.dtype, row(y, j), width);
  for (int64_t j = 0; j < x.size[2]; ++j) copy_row(x.dtype, row(x, j), y.dtype, row(y, kept + j), width);
}

}  // namespace
