// Cross-entropy of a linear layer's logits, x table^T + bias, without the logits in memory.
#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace pds {

struct CrossEntropyArgs {
  const void* x;        // [rows, dim]
  const void* table;    // [vocab, dim]
  const void* bias;     // [vocab] or null
  const int64_t* target;  // [rows]; `ignore_index` leaves the row out
  bool bf16;            // the floating-point type of x, table, bias and their gradients
  int64_t rows, dim, vocab, ignore_index;
  float smoothing;
  float* losses;        // [rows], forward
  float* lse;           // [rows] log of the sum of exp(logits): written by forward, read by backward
  const float* grad;    // [rows] gradient of the losses, backward
  void* grad_x;         // backward, [rows, dim]
  void* grad_table;     // backward, [vocab, dim]
  void* grad_bias;      // backward, [vocab] or null
};

PDS_DISPATCH(cross_entropy_forward, CrossEntropyArgs)
PDS_DISPATCH(cross_entropy_backward, CrossEntropyArgs)

}  // namespace pds
