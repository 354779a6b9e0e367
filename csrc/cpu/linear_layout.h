// What the two forms of the linear layer (linear.cpp, linear_tiles.h) share: how a weight is packed, and what follows the
// sums. Include it from linear.cpp only.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/linear.h"
#include "cpu/bf16_parts.h"
#include "cpu/gelu.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace pds {
namespace PDS_ISA {
namespace {

PDS_INLINE float element(const void* data, bool bf16, int64_t i) {
  return bf16 ? to_float(static_cast<const uint16_t*>(data)[i]) : static_cast<const float*>(data)[i];
}

// Sizes of the packed weight: panels of `depth` units of kWords words x kPanel columns, then the bias of every panel, then
// the exponents by which its columns are scaled, where they are.
template <typename Unit, int kWords = 1>
struct Layout {
  int64_t depth, panels;

  explicit Layout(const LinearArgs& args)
      : depth(kUnit<Unit> == 2 ? round_up(args.depth, 32) / 2 : args.depth),
        panels(args.geglu ? (args.columns / 2 + kWidth - 1) / kWidth : (args.columns + kPanel - 1) / kPanel) {}
  int64_t panel_size() const { return depth * kPanel * kWords; }
  Unit* panel(uint32_t* packed, int64_t p) const { return reinterpret_cast<Unit*>(packed) + p * panel_size(); }
  float* bias(uint32_t* packed) const { return reinterpret_cast<float*>(packed + panels * panel_size()); }
  float* exponents(uint32_t* packed) const { return bias(packed) + panels * kPanel; }
};

// The weight's row behind column j of panel p, or -1. For GEGLU the left half of a panel is a, the right half its gate.
PDS_INLINE int64_t source_row(const LinearArgs& args, int64_t p, int64_t j) {
  if (!args.geglu) return p * kPanel + j < args.columns ? p * kPanel + j : -1;
  const int64_t half = args.columns / 2, i = p * kWidth + j % kWidth;
  return i < half ? i + (j < kWidth ? 0 : half) : -1;
}

// n neighbours of a row, from float sums.
template <typename T>
PDS_INLINE void finish(const float* sums, int64_t n, const T* residual, T* out) {
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    vfloat x = load(sums + j);
    if (residual != nullptr) x += load(residual + j);
    store(out + j, x);
  }
  for (; j < n; ++j) from_float(out[j], residual != nullptr ? sums[j] + to_float(residual[j]) : sums[j]);
}

template <typename T>
PDS_INLINE void finish_geglu(vfloat a, vfloat gate, int64_t n, T* out) {
  const vfloat value = a * (gate * normal(gate, T{}).cdf);
  if (n >= kWidth) return store(out, value);
  for (int64_t j = 0; j < n; ++j) from_float(out[j], value[j]);
}

}  // namespace
}  // namespace PDS_ISA
}  // namespace pds
