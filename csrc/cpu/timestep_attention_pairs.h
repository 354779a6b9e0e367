// What timestep attention packs for AMX tiles, which multiply pairs of bfloat16 (gemm.h): both types in forward, bfloat16 in
// backward.
//
// Operands lie in blocks of 16 units of 32 queries, keys or features:
// * bfloat16: a unit is a pair of neighbours. k + tau is rounded.
// * float: three parts of each block (bf16_parts.h), whose units are 16 elements apart. Nothing is scaled: what elements
//   below 2^-110 lose is not seen in scores, nor in sums where a probability is near 1.
#pragma once
#include <limits>

#include "cpu/bf16_parts.h"
#include "cpu/timestep_attention.h"

#if PDS_AMX
namespace pds {
namespace PDS_ISA {

constexpr int64_t kStrip = AmxEngine::kRows;   // queries that pass over the keys together
static_assert(kStrip == kChunk && kPanel == kChunk && 2 * kWidth == kChunk);

inline Bf16Pair* take_pairs(Scratch& scratch, int64_t units) { return reinterpret_cast<Bf16Pair*>(scratch.take(units)); }

inline int64_t count_keys(const TimestepAttentionArgs& a, int64_t b) {
  if (!a.key_mask) return a.keys;
  const uint8_t* mask = a.key_mask + b * a.keys;
  return a.keys - std::count(mask, mask + a.keys, uint8_t{0});
}

// Where the features of a key or query come from; tau is there only if it turns the row.
template <typename T>
struct Row {
  const T *features, *tau;
};

template <typename T>
struct PairForm;

template <>
struct PairForm<float> {
  static constexpr int64_t kFewestKeys = 97;   // below that splitting costs as much as the tiles gain
  static constexpr int64_t kBlock = kParts * kBlockUnits;

  static PDS_INLINE vfloat exp2(vfloat x) { return exp2_of_nonpositive(x); }
  static PDS_INLINE void multiply(const Bf16Pair* left, const Bf16Pair* right) { multiply_parts(left, right, [] {}); }

  // Features d .. d+15.
  static PDS_INLINE vfloat get(Row<float> row, int64_t dim, int64_t d) {
    if (row.features == nullptr) return vfloat{};
    const vfloat x = read(row.features + d, dim - d);
    return row.tau ? turn(row.tau, dim, d, x) : x;
  }

  // Row i of 32.
  static PDS_INLINE void pack_query(Row<float> row, int64_t dim, int64_t padded, int64_t i, Bf16Pair* out) {
    for (int64_t d = 0; d < padded; d += kChunk, out += kBlock)
      split_parts(get(row, dim, d), get(row, dim, d + kWidth), out + i * kWidth);
  }

  // Writes k + tau, or the turned k. Returns the per-key term, spread over the lanes.
  static PDS_INLINE vfloat gather_key(Row<float> k, const float* tau, const float* u, const float* w, int64_t dim,
                                      int64_t padded, float* out) {
    vfloat sum{};
    for (int64_t d = 0; d < padded; d += kWidth) {
      vfloat x = get(k, dim, d);
      if (u) sum += x * read(u + d, dim - d);
      if (tau) {
        const vfloat time = read(tau + d, dim - d);
        if (w) sum += time * read(w + d, dim - d);
        x += time;
      }
      store(out + d, x);
    }
    return sum;
  }
  // 16 such rows -> half of the columns of [blocks][16][32].
  static void pack_keys(const float* rows, int64_t padded, Bf16Pair* out) {
    for (int64_t d = 0; d < padded; d += kChunk, out += kBlock)
      for (int64_t k = 0; k < kWidth; k += 4) {
        vfloat low[4], high[4];
        transpose_quad(rows + d + k, padded, low);
        transpose_quad(rows + d + k + kWidth, padded, high);
        for (int c = 0; c < 4; ++c) split_parts(low[c], high[c], out + (k + c) * kPanel);
      }
  }

  // 32 rows -> [blocks][16][32], features by 32.
  static void pack_values(const Row<float>* rows, int64_t dim, int64_t padded, Bf16Pair* out) {
    for (int64_t i = 0; i < kWidth; ++i)
      for (int64_t d = 0; d < padded; d += kWidth)
        split_parts(get(rows[i], dim, d), get(rows[i + kWidth], dim, d),
                    out + d / kChunk * kBlock + i * kPanel + d % kChunk);
  }

  static PDS_INLINE void put_probabilities(vfloat low, vfloat high, Bf16Pair* out) { split_parts(low, high, out); }
};

// Up to 32 elements of a row with `left` elements to go; the rest reads as zero.
PDS_INLINE __m512i read_pairs(const uint16_t* p, int64_t left) {
  const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << (left < 0 ? 0 : left)) - 1;
  return _mm512_maskz_loadu_epi16(mask, p);
}

// Element i of two vectors of bfloat16 as one unit, a in the lower half.
PDS_INLINE __m512i zip(__m512i a, __m512i b, bool high) {
  alignas(64) uint16_t lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = static_cast<uint16_t>(i / 2 + (high ? 16 : 0) + (i & 1) * 32);
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(lanes), b);
}
// The same of two vectors of float, rounded.
PDS_INLINE __m512i round_and_zip(vfloat a, vfloat b) {
  alignas(64) uint16_t lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = static_cast<uint16_t>(i / 2 + (i & 1) * 16);
  return _mm512_permutexvar_epi16(_mm512_load_si512(lanes), (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}

// a + b, rounded.
PDS_INLINE __m512i add_pairs(__m512i a, __m512i b) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return round_and_zip((vfloat)_mm512_slli_epi32(a, 16) + (vfloat)_mm512_slli_epi32(b, 16),
                       (vfloat)_mm512_and_si512(a, upper) + (vfloat)_mm512_and_si512(b, upper));
}

// 16 pairs of neighbouring features from d on, turned (timestep_attention_rotary.h).
PDS_INLINE __m512i turn_pairs(const uint16_t* tau, int64_t dim, int64_t d, __m512i x) {
  const auto read_floats = [&](const uint16_t* p) {
    return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(read_pairs(p, (dim - d) / 2))), 16);
  };
  const vfloat c = read_floats(tau + d / 2), s = read_floats(tau + dim / 2 + d / 2);
  const vfloat x1 = (vfloat)_mm512_slli_epi32(x, 16);
  const vfloat x2 = (vfloat)_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
  return round_and_zip(x1 * c - x2 * s, x2 * c + x1 * s);
}

// 2^x for x <= 0, to 3e-6, which rounding to bfloat16 hides; 0 for -inf.
PDS_INLINE vfloat rough_exp2_of_nonpositive(vfloat x) {
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);   // x - floor(x)
  vfloat p = splat(0.013534168f);
  p = p * f + splat(0.05201146f);
  p = p * f + splat(0.24144275f);
  p = p * f + splat(0.69300383f);
  p = p * f + splat(1.0000026f);
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)x);
}

template <>
struct PairForm<uint16_t> {
  static constexpr int64_t kFewestKeys = 17;
  static constexpr int64_t kBlock = kBlockUnits;

  static PDS_INLINE vfloat exp2(vfloat x) { return rough_exp2_of_nonpositive(x); }
  static PDS_INLINE void multiply(const Bf16Pair* left, const Bf16Pair* right) {
    load_left(left, kWidth);
    stream_right(right, kPanel);
    multiply_tiles();
  }

  // Features d .. d+31.
  static PDS_INLINE __m512i get(Row<uint16_t> row, int64_t dim, int64_t d) {
    if (row.features == nullptr) return _mm512_setzero_si512();
    const __m512i x = read_pairs(row.features + d, dim - d);
    return row.tau ? turn_pairs(row.tau, dim, d, x) : x;
  }

  static PDS_INLINE void pack_query(Row<uint16_t> row, int64_t dim, int64_t padded, int64_t i, Bf16Pair* out) {
    for (int64_t d = 0; d < padded; d += kChunk, out += kBlock) _mm512_storeu_si512(out + i * kWidth, get(row, dim, d));
  }

  // sum + a . b, spread over the lanes.
  static PDS_INLINE vfloat multiply_rows(vfloat sum, const uint16_t* a, const uint16_t* b, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 32)
      sum = (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)read_pairs(a + d, dim - d),
                                     (__m512bh)read_pairs(b + d, dim - d));
    return sum;
  }
  // Writes k + tau, rounded, or the turned k. Returns the per-key term, spread over the lanes.
  static PDS_INLINE vfloat gather_key(Row<uint16_t> k, const uint16_t* tau, const uint16_t* u, const uint16_t* w,
                                      int64_t dim, int64_t padded, float* out) {
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
    for (int64_t d = 0; d < padded; d += 32) {
      const __m512i x = get(k, dim, d);
      _mm512_storeu_si512(to + d, tau ? add_pairs(x, read_pairs(tau + d, dim - d)) : x);
    }
    vfloat sum{};
    if (u) sum = multiply_rows(sum, k.features, u, dim);
    if (tau && w) sum = multiply_rows(sum, tau, w, dim);
    return sum;
  }
  static void pack_keys(const float* rows, int64_t padded, Bf16Pair* out) {
    for (int64_t k = 0; k < padded / 2; k += 4) {
      vfloat quad[4];
      transpose_quad(rows + k, padded, quad);
      for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + (k + c) * kPanel, (__m512i)quad[c]);
    }
  }

  static void pack_values(const Row<uint16_t>* rows, int64_t dim, int64_t padded, Bf16Pair* out) {
    for (int64_t i = 0; i < kWidth; ++i)
      for (int64_t d = 0; d < padded; d += kChunk) {
        const __m512i even = get(rows[2 * i], dim, d), odd = get(rows[2 * i + 1], dim, d);
        Bf16Pair* to = out + d / kChunk * kBlock + i * kPanel;
        _mm512_storeu_si512(to, zip(even, odd, false));
        _mm512_storeu_si512(to + kWidth, zip(even, odd, true));
      }
  }

  static PDS_INLINE void put_probabilities(vfloat low, vfloat high, Bf16Pair* out) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
};

}  // namespace PDS_ISA
}  // namespace pds
#endif
