// Arguments of the dropout kernel.
#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace pds {

// One Philox block serves eight elements: element 8 b + e is dropped where the e-th 16-bit piece of the block (low half of
// word 0 first) lies below `threshold`. Block b has the counter (b low, stream word of `dropout`, b high, 0).
constexpr int kDropoutElementsPerBlock = 8;
constexpr uint32_t kDropoutAll = 65536;

// out = residual + (kept ? scale x : 0); without a residual, just the dropped-out x.
struct DropoutArgs {
  const void* x;
  const void* residual;   // or null
  void* out;
  int64_t n;
  uint64_t seed;
  uint32_t threshold;     // 0 (keep all) .. 65536 (drop all)
  float scale;            // 65536 / (65536 - threshold)
  bool bf16;
};

PDS_DISPATCH(dropout, DropoutArgs)

}  // namespace pds
