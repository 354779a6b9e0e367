// Products of float32 matrices on bfloat16 tiles. A float of 24 significant bits is the sum of three bfloat16 parts of 8,
// and a product of two floats that of nine products of parts. Six are summed, in float32; the other three are below
// 2^-25 of it together, so that the error of a sum is float32's (measured: less than half that of a chain of fused
// multiply-adds from 32 terms on, 1.2 x it for one).
// Include it from op files only (it needs PDS_ISA).
#pragma once
#include <algorithm>

#include "cpu/gemm.h"

#if PDS_AMX
namespace pds {
namespace PDS_ISA {

constexpr int kParts = 3;
constexpr int64_t kChunk = 32;                    // elements that a tile multiplies along the summed dimension
constexpr int64_t kBlockUnits = 32 * kChunk / 2;  // units of one part of 32 rows of a chunk
// The tile instructions take subnormal numbers for zero. So rows are scaled by powers of two until their largest element
// is here: its products with another row's stay below 2^98, and what is 2^-150 of it still keeps its 24 bits.
constexpr float kLargest = 48.f;

PDS_INLINE float largest_of(vfloat x) {
  x = vmax(x, (vfloat)_mm512_maskz_shuffle_f32x4(0xFFFF, (__m512)x, (__m512)x, 0x4E));
  x = vmax(x, (vfloat)_mm512_maskz_shuffle_f32x4(0xFFFF, (__m512)x, (__m512)x, 0xB1));
  x = vmax(x, (vfloat)_mm512_maskz_permute_ps(0xFFFF, (__m512)x, 0x4E));
  return vmax(x, (vfloat)_mm512_maskz_permute_ps(0xFFFF, (__m512)x, 0xB1))[0];
}

// The exponent by which a row of n floats is to be scaled; -inf where one of them is infinite.
PDS_INLINE float parts_exponent(const float* row, int64_t n) {
  const auto size = [](__m512 x) { return as_float(as_int((vfloat)x) & splat(int32_t{0x7FFFFFFF})); };
  vfloat most[2] = {};
  int64_t k = 0;
  for (; k + 32 <= n; k += 32)
    for (int i = 0; i < 2; ++i) most[i] = vmax(size(_mm512_loadu_ps(row + k + 16 * i)), most[i]);
  for (; k < n; k += 16) {
    const __mmask16 rest = static_cast<__mmask16>((1u << std::min<int64_t>(16, n - k)) - 1);
    most[0] = vmax(size(_mm512_maskz_loadu_ps(rest, row + k)), most[0]);
  }
  const float largest = largest_of(vmax(most[0], most[1]));
  return largest == 0.f ? 0.f : kLargest - _mm_cvtss_f32(_mm_getexp_ss(_mm_setzero_ps(), _mm_set_ss(largest)));
}

// The nearest number with 8 significant bits, away from zero between two. It may lose what is undefined, but not from the
// rest that is left of it.
PDS_INLINE vfloat leading_part(vfloat x) {
  return as_float((as_int(x) + splat(0x8000)) & splat(static_cast<int32_t>(0xFFFF0000)));
}

// 32 floats of a chunk, scaled (else those below 2^-110 lose bits), as three parts, kBlockUnits apart. Unit j of 16 has
// elements j and j + 16. An infinite or undefined element makes its products undefined, and those of its row alone.
PDS_INLINE void split_parts(vfloat low, vfloat high, Bf16Pair* out) {
  for (int part = 0; part < kParts; ++part) {
    const bool last = part == kParts - 1;   // what is left has 8 bits, unless it is subnormal
    const vfloat lower = last ? low : leading_part(low), upper = last ? high : leading_part(high);
    const __m512i shifted = (__m512i)(reinterpret_cast<vuint>(lower) >> 16);
    const __m512i units = _mm512_mask_blend_epi16(0xAAAAAAAAu, shifted, (__m512i)upper);
    _mm512_storeu_si512(out + part * kBlockUnits, units);
    low -= lower;   // exact
    high -= upper;
  }
}

// The parts of up to 32 rows of n floats: [chunks][kParts][32 rows][16 units], with the exponent of each row. The
// other rows are zero if there are more than 16, else not written.
PDS_INLINE void split_rows(const float* x, int64_t row, int64_t count, int64_t n, Bf16Pair* out, float* exponents) {
  constexpr int64_t kGroup = 4 * kChunk;   // so that what is written stays in the first-level cache
  const int64_t padded = count > 16 ? 32 : count;
  for (int64_t i = 0; i < padded; ++i) exponents[i] = i < count ? parts_exponent(x + i * row, n) : 0.f;
  for (int64_t first = 0; first < n; first += kGroup) {
    for (int64_t i = 0; i < padded; ++i) {
      const __m512 exponent = (__m512)splat(exponents[i]);
      for (int64_t k = first; k < std::min(n, first + kGroup); k += kChunk) {
        const uint32_t kept = i >= count ? 0 : n - k >= kChunk ? ~0u : (1u << (n - k)) - 1;
        const float* from = x + i * row + k;
        const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), from);
        const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept >> 16), from + 16);
        split_parts((vfloat)_mm512_maskz_scalef_ps(0xFFFF, low, exponent),
                    (vfloat)_mm512_maskz_scalef_ps(0xFFFF, high, exponent),
                    out + k / kChunk * kParts * kBlockUnits + i * 16);
      }
    }
  }
}

// A right side of 32 columns that is kept as floats, scaled, in the order of tiles, [chunks][16 units][2 x 16 columns][2 x
// 16]: the lower elements of 16 units, then the upper ones. take() makes the parts of one line of 32, for blocks
// [chunks][kParts][16 units][32 columns].
struct ColumnSplit {
  const float* from = nullptr;
  Bf16Pair* to = nullptr;
  int64_t steps = 0;   // left to take: chunks * 32

  PDS_INLINE void take(int64_t count) {
    constexpr int64_t kAhead = 1024;
    const float* line = from;   // copies, which stay in registers
    Bf16Pair* out = to;
    const int64_t left = std::max<int64_t>(0, steps - count);
    for (int64_t i = steps; i > left;) {
      __builtin_prefetch(line + kAhead);
      __builtin_prefetch(line + kAhead + 16);
      split_parts(load(line), load(line + 16), out);
      line += 32;
      out += --i % 32 == 0 ? 16 + (kParts - 1) * kBlockUnits : 16;
    }
    from = line, to = out, steps = left;
  }
};

// The six products: part of the left side, part of the right one. One of them stays from product to product.
constexpr int kPartProducts[6][2] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

// Tiles 0 to 3 (see multiply_tiles) += one chunk of 32 rows of the left side times one of the right side, with a call of
// `meanwhile` after each of the six products: the tiles leave the vector units idle.
template <typename Meanwhile>
PDS_INLINE void multiply_parts(const Bf16Pair* left, const Bf16Pair* right, Meanwhile&& meanwhile) {
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    const auto [a, b] = kPartProducts[i];
    if (i == 0 || a != kPartProducts[i - 1][0]) load_left(left + a * kBlockUnits, 16);
    if (i == 0 || b != kPartProducts[i - 1][1]) load_right(right + b * kBlockUnits, kPanel);
    multiply_tiles();
    meanwhile();
  }
}

// The same of 16 rows times two right sides, for tiles 0 and 1, and 2 and 3.
template <typename Meanwhile>
PDS_INLINE void multiply_parts_short(const Bf16Pair* left, const Bf16Pair* right, const Bf16Pair* other,
                                     Meanwhile&& meanwhile) {
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    const auto [a, b] = kPartProducts[i];
    if (i == 0 || a != kPartProducts[i - 1][0]) PDS_TILE_LOAD(4, left + a * kBlockUnits, 64);
    multiply_short(right + b * kBlockUnits, other + b * kBlockUnits);
    meanwhile();
  }
}

}  // namespace PDS_ISA
}  // namespace pds
#endif
