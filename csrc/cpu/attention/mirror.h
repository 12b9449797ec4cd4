// Mirrors: codes kept beside a cache of floats. Decoding reads the codes, a fraction of the bytes; what attends with
// many rows reads the floats. Whoever decodes first after slots were written rounds them, and the state says which are
// up to date, so that the next call rounds only what is new.
//
// State [B,Hkv,2] i64: slots [begin, end) of each head hold what the floats held. It counts slots of the memory behind
// it, where codes begin: those of a call may begin later, as a window does whose oldest keys fell off. Whoever changes
// the floats in another way than by this kernel, or by writes that it is told of (new rows, positions), empties the
// state.
#pragma once
#include "cpu/attention/rope.h"

namespace {

struct Slots {
  int64_t begin, end;
};

// From the state of all heads to the codes of the first slot.
inline int64_t state_bytes(const Tensor& state) { return ceil_div(state.size[0] * state.size[1] * 16, 64) * 64; }

inline int64_t first_slot(const Mirror& m) {
  return (m.codes->data - m.state->data - state_bytes(*m.state)) / m.codes->stride[2];
}
inline int64_t* slots_of(const Mirror& m, int64_t b, int64_t head) {
  return reinterpret_cast<int64_t*>(m.state->data) + (b * m.state->size[1] + head) * 2;
}

// The smallest interval with every slot that this call or a step in front of it writes.
inline Slots written_slots(const Problem& p) {
  if (!p.positions) return {p.kv_len - p.new_len, p.kv_len};
  Slots s{p.kv_len, 0};
  for (int64_t j = 0; j < p.positions->size[0]; ++j) {
    const int64_t slot = slot_of(p, j);
    s.begin = min64(s.begin, slot), s.end = max64(s.end, slot + 1);
  }
  return s;
}

// Slots of this call whose codes are up to date; those behind a written one no longer count.
inline Slots coded_slots(const Problem& p, const Mirror& m, int64_t b, int64_t head) {
  const int64_t* state = slots_of(m, b, head);
  const int64_t first = first_slot(m);
  Slots s{state[0] - first, state[1] - first};
  const Slots written = written_slots(p);
  if (written.begin < s.end && written.end > s.begin) s.end = max64(s.begin, written.begin);
  return s;
}

// Rounds those of the slots [begin, end) that are not up to date.
inline void round_slots(const Problem& p, const Tensor& cache, int64_t dim, const Mirror& m, int64_t b, int64_t head,
                        int64_t begin, int64_t end) {
  const Slots coded = coded_slots(p, m, b, head);
  alignas(64) float row[kMaxHeadDim + kLanes];
  for (int64_t slot = begin; slot < end; ++slot) {
    if (slot >= coded.begin && slot < coded.end) slot = coded.end;
    if (slot >= end) break;
    load_row(cache.dtype, row_ptr(cache, b, head, slot), dim, row);
    store_codes(row_ptr(*m.codes, b, head, slot), dim, row);
  }
}
__attribute__((noinline)) void round_new_slots(const Problem& p, int64_t b, int64_t head, int64_t begin, int64_t end) {
  round_slots(p, *p.k_cache, p.head_dim, p.k_mirror, b, head, begin, end);
  round_slots(p, *p.v_cache, p.v_dim, p.v_mirror, b, head, begin, end);
}

inline void note_slots(const Problem& p, const Mirror& m, int64_t b, int64_t head, Slots rounded) {
  Slots coded = coded_slots(p, m, b, head);
  const bool is_apart = coded.begin >= coded.end || rounded.begin > coded.end || rounded.end < coded.begin;
  if (rounded.begin < rounded.end)
    coded = is_apart ? rounded : Slots{min64(coded.begin, rounded.begin), max64(coded.end, rounded.end)};
  const int64_t first = first_slot(m);
  int64_t* state = slots_of(m, b, head);
  state[0] = coded.begin + first, state[1] = coded.end + first;
}

// After a call that rounded what was not up to date of these slots; none where it only wrote.
__attribute__((noinline)) void note_rounded(const Problem& p, int64_t b, int64_t head, Slots rounded) {
  note_slots(p, p.k_mirror, b, head, rounded);
  note_slots(p, p.v_mirror, b, head, rounded);
}

}  // namespace
