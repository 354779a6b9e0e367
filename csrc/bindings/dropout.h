// What the bindings of the dropout kernels on the CPU and on CUDA share.
#pragma once
#include "bindings/module.h"
#include "common/dropout.h"

namespace pds {

inline DropoutArgs dropout_args(Address x, Address residual, Address out, int64_t n, uint64_t seed, uint32_t threshold, bool bf16) {
  const float scale = threshold >= kDropoutAll ? 0.f : 65536.f / static_cast<float>(kDropoutAll - threshold);
  return {pointer<const void>(x), pointer<const void>(residual), pointer<void>(out), n, seed, threshold, scale, bf16};
}

}  // namespace pds
