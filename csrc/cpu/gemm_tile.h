// Products of the small matrices of one attention head, whose sides range from 7 to some hundreds: register tiles of
// every height (no padding of rows), widths in whole vectors, no packing inside.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "cpu/prefetch.h"
#include "cpu/simd.h"

namespace pds {
namespace PDS_ISA {

#if PDS_WIDTH == 16 || defined(__aarch64__)
constexpr int kMaxColumns = 4;                              // vectors per tile row
constexpr int kMaxRows[kMaxColumns + 1] = {0, 14, 12, 8, 6};   // by number of vectors: up to 24 of 32 registers
#else
constexpr int kMaxColumns = 2;
constexpr int kMaxRows[kMaxColumns + 1] = {0, 10, 6};          // 12 of 16 registers
#endif
constexpr int kTallest = kMaxRows[1];
constexpr int64_t kDepthBlock = 128;   // summed this far at a time, so that the B block stays in the first-level cache

constexpr int64_t align_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct TileShape {
  int64_t depth, lda, ldb, ldc;
  bool accumulate;
  const float* start = nullptr;    // else what each row of C starts from, if given
  const float* factor = nullptr;   // what each row of C is multiplied with at last, if given
};

// C[kRows][kColumns vectors] (+)= (start + sum over k of A(i, k) B(k, :)) factor. A(i, k) is a[i * lda + k], or a[k * lda + i] if
// kTransposed. With kFetch each step of k fetches a line ahead.
template <bool kTransposed, bool kFetch, int kRows, int kColumns>
void multiply_tile(const TileShape& s, const float* a, const float* b, float* c, Prefetch::Walk ahead) {
  vfloat sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n)
      sum[i][n] = s.accumulate ? load(c + i * s.ldc + n * kWidth) : s.start ? splat(s.start[i]) : vfloat{};
  const int64_t row = kTransposed ? 1 : s.lda, step = kTransposed ? s.lda : 1;
  for (int64_t k = 0; k < s.depth; ++k, a += step, b += s.ldb) {
    if (kFetch) {
      Prefetch::fetch_line(ahead.at);
      ahead.at += kLine;
      if (--ahead.left == 0) {
        ahead.at += ahead.jump;
        ahead.left = ahead.per_row;
      }
    }
    vfloat right[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) right[n] = load(b + n * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const vfloat left = splat(a[i * row]);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) sum[i][n] += left * right[n];
    }
  }
  if (s.factor) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) sum[i][n] *= splat(s.factor[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) store(c + i * s.ldc + n * kWidth, sum[i][n]);
}

using TileFunction = void (*)(const TileShape&, const float*, const float*, float*, Prefetch::Walk);

template <bool kTransposed, bool kFetch, int kColumns, int... kHeights>
constexpr std::array<TileFunction, kTallest> tile_heights(std::integer_sequence<int, kHeights...>) {
  return {(kHeights < kMaxRows[kColumns]
               ? &multiply_tile<kTransposed, kFetch, (kHeights < kMaxRows[kColumns] ? kHeights + 1 : 1), kColumns>
               : nullptr)...};
}

template <bool kTransposed, bool kFetch, int... kWidths>
constexpr std::array<std::array<TileFunction, kTallest>, kMaxColumns> tile_table(std::integer_sequence<int, kWidths...>) {
  return {tile_heights<kTransposed, kFetch, kWidths + 1>(std::make_integer_sequence<int, kTallest>{})...};
}

// C[rows][columns] (+)= A B with `columns` a multiple of kWidth; see multiply_tile for A. Sums run in the order of k.
template <bool kTransposed>
void multiply(int64_t rows, int64_t columns, TileShape shape, const float* a, const float* b, float* c, Prefetch& ahead) {
  constexpr auto widths = std::make_integer_sequence<int, kMaxColumns>{};
  static constexpr auto fetching = tile_table<kTransposed, true>(widths), plain = tile_table<kTransposed, false>(widths);
  const auto& table = ahead.empty() ? plain : fetching;
  const int64_t depth = shape.depth, first = shape.accumulate;
  const float *start = shape.start, *factor = shape.factor;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepthBlock) {
    shape.depth = std::min(kDepthBlock, depth - k0);
    shape.accumulate = first || k0 > 0;
    for (int64_t n0 = 0; n0 < columns;) {
      const int wide = static_cast<int>(std::min<int64_t>(kMaxColumns, (columns - n0) / kWidth));
      // As few tiles as there can be, of two heights, the taller ones first.
      const int64_t tiles = (rows + kMaxRows[wide] - 1) / kMaxRows[wide], low = rows / tiles;
      int64_t taller = rows - low * tiles;
      for (int64_t i0 = 0, height; i0 < rows; i0 += height) {
        height = low + (taller-- > 0);
        shape.start = start ? start + i0 : nullptr;
        shape.factor = factor && k0 + shape.depth == depth ? factor + i0 : nullptr;
        const float* left = kTransposed ? a + k0 * shape.lda + i0 : a + i0 * shape.lda + k0;
        table[wide - 1][height - 1](shape, left, b + k0 * shape.ldb + n0, c + i0 * shape.ldc + n0,
                                    ahead.take(shape.depth, left));
      }
      n0 += static_cast<int64_t>(wide) * kWidth;
    }
  }
}

}  // namespace PDS_ISA
}  // namespace pds
