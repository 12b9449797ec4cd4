// The epilogue of products on AMX tiles.
//
// A product of 32 rows and a panel is made of rounds: the two row tiles times the two tiles of a panel, for as many k
// as a register holds. One that is finished but for its epilogue waits. That is done a few rows at a time between the
// rounds of the next product: the core looks only some hundred instructions ahead, so the tiles would idle while it
// works on all rows. Beside tile products a core does one vector instruction a cycle instead of two, lookups and
// shuffles apart, which have a port of their own, and its loads wait for those of the tiles: what an epilogue costs is
// the number of its other instructions, so all that is the same in all rows is found once a product, the code for it
// once a chunk.
#pragma once
#include "cpu/linear/epilogue.h"

namespace {

constexpr int64_t kTileHeight = 2 * kTileRows;  // rows of a product
constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kRoundsBefore = 3;  // of the next product: rows would wait for their sums to be stored

// When so many rounds make room for rows of the product before.
struct Pace {
  int64_t rows, every;

  explicit Pace(int64_t rounds) {
    constexpr int64_t kCalls = kTileHeight / kRowsAtOnce;
    const int64_t free = max64(1, rounds - kRoundsBefore);
    every = max64(1, free / kCalls);
    rows = ceil_div(kCalls, free) * kRowsAtOnce;
  }
};

// Sum: what the sums of a product become, a class with a copy for every product:
//   Vec operator()(int m, int v, Vec bias) const   vector v of the m-th row that waits, with the bias
//   void advance(int64_t rows)                     so many wait no more
template <class Sum>
class TileEpilogue {
 public:
  explicit TileEpilogue(const Problem& p) {
    with_activation_and_dtype(p.act, p.y.dtype, [this](auto act, auto out) {
      finish_ = finish_some<decltype(act)::value, static_cast<DType>(decltype(out)::value)>;
    });
  }
  // Nothing waits when the next product does.
  void begin(const PanelOutputs& outputs, int64_t rows, const Sum& sum) {
    outputs_ = outputs, sum_ = sum, left_ = rows;
  }
  inline __attribute__((always_inline)) void some(int64_t most) {
    if (left_ > 0) finish_(*this, static_cast<int>(min64(most, left_)));
  }
  void rest() { some(left_); }

 private:
  template <int64_t kAct, DType kOut>
  static __attribute__((noinline)) void finish_some(TileEpilogue& e, int rows) {
    const Sum sum = e.sum_;
    finish_rows<kAct, kOut>(e.outputs_, rows, sum);
    e.outputs_.advance(rows);
    e.sum_.advance(rows);
    e.left_ -= rows;
  }

  void (*finish_)(TileEpilogue&, int);
  int64_t left_ = 0;
  PanelOutputs outputs_;
  Sum sum_;
};

}  // namespace
