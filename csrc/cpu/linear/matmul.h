// Products of activations, one matrix with one at each place of a batch. A product is a linear whose weight is packed
// for this call alone: each chunk packs the panels that it multiplies by, into memory that stays in the L2 of its core.
// Rows are prepared there too, where a chunk has all columns; else once for all chunks (phase 0).
#pragma once
#include "cpu/linear/few_rows.h"
#include "cpu/linear/pack.h"
#include "cpu/linear/problem.h"

namespace {

// Of a chunk, behind the scratch memory of a linear.
constexpr int64_t kPackedBytes = int64_t(kMostLocalBytes - kLocalBytes) / 2, kPreparedBytes = kPackedBytes;
constexpr int64_t kPackedSpan = 256 << 10;  // bytes of panels of a chunk that has several
// Of a product whose rows are cut. So many run on the same kernel as all rows do, whatever the number of threads is.
constexpr int64_t kMinBlockRows = 112;

// How a step is cut: the rows of each product into blocks, its columns into spans of panels.
struct MatmulCut {
  const int64_t batch, M, N, K;
  const DType weight;
  int64_t panels, span, spans, blocks;

  MatmulCut(const Step& s, int threads)
      : batch(batch_of(s.t[3])),
        M(s.t[3].size[s.t[3].ndim - 2]),
        N(s.t[3].size[s.t[3].ndim - 1]),
        K(s.t[0].size[s.t[0].ndim - 1]),
        weight(s.t[1].dtype),
        panels(ceil_div(N, kPanel)) {
    const int64_t wanted = ceil_div(kChunksPerThread * threads, max64(1, batch));
    span = max64(1, min64(panels / wanted, kPackedSpan / max64(1, bytes())));
    spans = ceil_div(panels, span);
    // Enough chunks for all threads, and rows that stay in L2 beside the panels. Every block packs those again.
    const int64_t shared = ceil_div(wanted, max64(1, spans));
    const int64_t fitting = spans == 1 ? ceil_div(M * K * 4, kPreparedBytes / 2) : 1;
    blocks = max64(1, min64(max64(shared, fitting), M / kMinBlockRows));
  }
  static int64_t batch_of(const Tensor& y) {
    int64_t count = 1;
    for (int d = 0; d + 2 < y.ndim; ++d) count *= y.size[d];
    return count;
  }
  int64_t bytes() const { return panel_bytes(K, weight); }  // of a panel
  bool packs_locally() const { return bytes() <= kPackedBytes; }
  int64_t units() const { return M && N ? batch * blocks : 0; }  // blocks of all products
  int64_t row(int64_t block) const { return block * M / blocks; }
  int64_t tallest() const { return ceil_div(M, blocks); }
  int64_t shortest() const { return M / blocks; }
};

// The linear of one product: rows [row0, row1) by columns [column0, column1).
struct MatmulPart {
  Tensor t[kLinearOperands + 1] = {};  // one more than a linear's, so that a kernel sees that it is not alone
  int64_t ints[kLinearInts] = {};
  float floats[3] = {0.0f, 1.0f, 0.0f};
  Step step;

  MatmulPart(const Step& s, int64_t batch, int64_t row0, int64_t row1, int64_t column0, int64_t column1) {
    const Tensor& w = s.t[1];
    t[0] = matrix(s.t[0], batch), t[4] = matrix(s.t[3], batch);
    take_rows(t[0], row0, row1), take_rows(t[4], row0, row1);
    t[4].data += column0 * itemsize(t[4].dtype);
    t[4].size[1] = column1 - column0;
    if (s.t[2].data) {
      t[2] = s.t[2];
      t[2].data += column0 * t[2].stride[0] * itemsize(t[2].dtype);
      t[2].size[0] = column1 - column0;
    }
    ints[0] = column1 - column0, ints[1] = t[0].size[1], ints[2] = static_cast<int64_t>(w.dtype);
    step = {t, ints, floats, kLinearOperands + 1, kLinearInts, 3};
  }
  MatmulPart(const MatmulPart&) = delete;

  static Tensor matrix(const Tensor& of, int64_t batch) {
    const int outer = of.ndim - 2;
    Tensor m{of.data + position_offset(of, outer, batch) * itemsize(of.dtype), of.dtype, 2, {}, {}};
    for (int d = 0; d < 2; ++d) m.size[d] = of.size[outer + d], m.stride[d] = of.stride[outer + d];
    return m;
  }
  static void take_rows(Tensor& m, int64_t row0, int64_t row1) {
    m.data += row0 * m.stride[0] * itemsize(m.dtype);
    m.size[0] = row1 - row0;
  }
};

// kEach: the linear of one product; a chunk is one thread's, so it runs as on one.
template <const Kernel& kEach>
struct Matmul {
  // The larger of what a linear of the tallest and one of the shortest block say.
  template <class F>
  static int64_t most(const Step& s, const MatmulCut& cut, F f) {
    const MatmulPart tall(s, 0, 0, cut.tallest(), 0, cut.N), low(s, 0, 0, cut.shortest(), 0, cut.N);
    return max64(f(tall.step), f(low.step));
  }
  // Whether no panels are packed.
  static bool is_direct(const Step& s, const MatmulCut& cut) {
    const Tensor& w = s.t[1];
    const bool readable = w.stride[w.ndim - 1] == 1 || w.stride[w.ndim - 2] == 1;
    return cut.M <= kFewRows && readable && cut.M * cut.K * 4 <= kPreparedBytes;
  }
  static void run_direct(const Step& s, int64_t product, int64_t column0, int64_t column1, const Scratch& scratch) {
    const Tensor x = MatmulPart::matrix(s.t[0], product), w = MatmulPart::matrix(s.t[1], product),
                 y = MatmulPart::matrix(s.t[3], product);
    const int64_t K = x.size[1];
    float* rows = reinterpret_cast<float*>(scratch.local);
    for (int64_t m = 0; m < x.size[0]; ++m)
      for (int64_t k = 0; k < K; k += kLanes) {
        const int n = static_cast<int>(min64(kLanes, K - k));
        vstore_n(rows + m * K + k, vload_as(x.dtype, x.data, m * x.stride[0] + k, n), n);
      }
    run_few_rows({rows, x.size[0], K, w, s.t[2], y}, column0, column1);
  }

  static int64_t prepare_chunks(const Step& s, const MatmulCut& cut) {
    return most(s, cut, [](const Step& each) { return kEach.phases(each, 1) > 1 ? kEach.chunks(each, 0, 1) : 0; });
  }
  static int64_t prepared_bytes(const Step& s, const MatmulCut& cut) {
    return most(s, cut, [](const Step& each) { return ceil_div(int64_t(kEach.workspace(each, 1)), 64) * 64; });
  }
  // Whether rows are prepared for all chunks together.
  static bool prepares_first(const Step& s, const MatmulCut& cut) {
    return cut.units() && !is_direct(s, cut) && (cut.spans > 1 || prepared_bytes(s, cut) > kPreparedBytes) &&
           prepare_chunks(s, cut) > 0;
  }

  static int phases(const Step& s, int threads) { return prepares_first(s, MatmulCut(s, threads)) ? 2 : 1; }

  static int64_t chunks(const Step& s, int phase, int threads) {
    const MatmulCut cut(s, threads);
    return cut.units() * (phase == 0 && prepares_first(s, cut) ? prepare_chunks(s, cut) : cut.spans);
  }

  static size_t workspace(const Step& s, int threads) {
    const MatmulCut cut(s, threads);
    const int64_t prepared = prepares_first(s, cut) ? prepared_bytes(s, cut) : 0;
    const int64_t packed = cut.packs_locally() || is_direct(s, cut) ? 0 : cut.spans * cut.span * cut.bytes();
    return static_cast<size_t>(cut.units() * (prepared + packed));
  }

  static void run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
    const MatmulCut cut(s, threads);
    const bool together = prepares_first(s, cut), prepares = together && phase == 0;
    const int64_t a_unit = prepares ? prepare_chunks(s, cut) : cut.spans, unit = chunk / a_unit, part = chunk % a_unit;
    const int64_t product = unit / cut.blocks, row0 = cut.row(unit % cut.blocks), row1 = cut.row(unit % cut.blocks + 1);
    const int64_t panel0 = part * cut.span, panel1 = min64(cut.panels, panel0 + cut.span);
    const int64_t column0 = panel0 * kPanel, column1 = min64(cut.N, panel1 * kPanel);
    if (is_direct(s, cut)) return run_direct(s, product, column0, column1, scratch);
    const int64_t prepared = together ? prepared_bytes(s, cut) : 0;
    char* rows = together ? scratch.shared + unit * prepared : scratch.local + kLocalBytes + kPackedBytes;
    const Scratch own{rows, scratch.local, scratch.counters};
    if (!together || prepares) {
      const MatmulPart each(s, product, row0, row1, 0, cut.N);
      const int64_t all = kEach.phases(each.step, 1) > 1 ? kEach.chunks(each.step, 0, 1) : 0;
      const int64_t first = prepares ? part : 0, end = prepares ? min64(part + 1, all) : all;
      for (int64_t i = first; i < end; ++i) kEach.run(each.step, 0, i, 1, own);
    }
    if (prepares) return;
    char* packed = cut.packs_locally() ? scratch.local + kLocalBytes
                                       : scratch.shared + cut.units() * prepared + chunk * cut.span * cut.bytes();
    pack(s, product, column0, column1, packed);
    MatmulPart each(s, product, row0, row1, column0, column1);
    each.t[1].data = packed;
    const int last = kEach.phases(each.step, 1) - 1;
    const int64_t count = kEach.chunks(each.step, last, 1);
    for (int64_t i = 0; i < count; ++i) kEach.run(each.step, last, i, 1, own);
  }

  static void pack(const Step& s, int64_t product, int64_t column0, int64_t column1, char* packed) {
    Tensor t[2] = {MatmulPart::matrix(s.t[1], product), {packed, DType::u8, 1, {}, {}}};
    MatmulPart::take_rows(t[0], column0, column1);
    const int64_t interleave = 0;
    const Step step{t, &interleave, nullptr, 2, 1, 0};
    for (int64_t panel = 0; panel < ceil_div(column1 - column0, kPanel); ++panel) pack_run(step, 0, panel, 1, {});
  }
};

}  // namespace
