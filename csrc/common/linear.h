// Arguments of the row-invariant linear layer.
#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace pds {

// linear_pack: weight [columns, depth] and bias [columns] (or null) -> packed, in a layout of the instruction set.
// linear: out [rows, columns] = x [rows, depth] weight^T + bias (+ residual [rows, columns]). With geglu the weight's
// first half gives a and its second half the gate, and out [rows, columns / 2] = a GELU(gate).
struct LinearArgs {
  const void* x;
  const void* weight;
  const void* bias;
  const void* residual;   // null: none
  void* out;
  uint32_t* packed;       // linear_packed_words() of them
  int64_t rows, columns, depth;
  bool bf16, geglu;
};

// Enough for every instruction set; a column has a bias and an exponent.
inline int64_t linear_packed_words(int64_t columns, int64_t depth) {
  const int64_t panels = (columns + 31) / 32 + 1;   // one more: the halves of GEGLU are padded apart
  return panels * 32 * ((depth + 31) / 32 * 32 + 2);
}

PDS_DISPATCH(linear_pack, LinearArgs)
PDS_DISPATCH(linear, LinearArgs)

}  // namespace pds
