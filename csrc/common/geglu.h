// Arguments of the GEGLU kernels.
#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace pds {

// geglu: x is [rows, 2 columns], each row a then gate, and out [rows, columns] = a GELU(gate). geglu_backward: grad is
// [rows, columns], out the gradient of x. All contiguous.
struct GegluArgs {
  const void* grad;   // null in geglu
  const void* x;
  void* out;
  int64_t rows, columns;
  bool bf16;
};

PDS_DISPATCH(geglu, GegluArgs)
PDS_DISPATCH(geglu_backward, GegluArgs)

}  // namespace pds
