// Timestep attention in bfloat16 on AMX tiles, which multiply pairs (gemm.h). Without AMX the float kernels are faster.
//
// As in timestep_attention.h scores are [key][query]. The keys' features and the time's lie side by side in a row, and the
// transposed queries twice, one below the other, so that q . k + q . tau is one product of unrounded operands with float32
// sums. The per-key term stays float32 and is added to the scores.
#pragma once
#include "cpu/gemm.h"
#include "cpu/timestep_attention.h"

#if PDS_AMX
namespace pds {
namespace PDS_ISA {

constexpr float kLog2e = 1.44269504f;
constexpr int64_t kPairStep = 16;        // units of depth that an AMX tile takes at a time
constexpr int64_t kFewestPairKeys = 17;  // heads with fewer keys take the float kernels, which pad nothing

// Which kernel a head takes depends on its own keys alone: a sentence comes out the same in any batch.
inline bool use_pairs(int64_t keys) { return keys >= kFewestPairKeys; }

inline Bf16Pair* take_pairs(Scratch& scratch, int64_t units) { return reinterpret_cast<Bf16Pair*>(scratch.take(units)); }

// Up to 32 elements of a row with `left` elements to go; the rest reads as zero.
PDS_INLINE __m512i read_pairs(const uint16_t* p, int64_t left) {
  const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << (left < 0 ? 0 : left)) - 1;
  return _mm512_maskz_loadu_epi16(mask, p);
}
PDS_INLINE void store_pairs(Bf16Pair* p, __m512i x) { _mm512_storeu_si512(p, x); }

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
// 32 features of a row from d on; turned by tau, if given.
PDS_INLINE __m512i read_features(const uint16_t* row, int64_t dim, int64_t d, const uint16_t* tau) {
  const __m512i x = read_pairs(row + d, dim - d);
  return tau ? turn_pairs(tau, dim, d, x) : x;
}

PDS_INLINE void copy_row(const uint16_t* row, int64_t dim, int64_t depth, const uint16_t* turned_by, Bf16Pair* out) {
  for (int64_t k = 0; k < depth; k += kPairStep) store_pairs(out + k, read_features(row, dim, 2 * k, turned_by));
}

// sum + a . b, spread over the lanes.
PDS_INLINE vfloat multiply_rows(vfloat sum, const uint16_t* a, const uint16_t* b, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 32)
    sum = (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)read_pairs(a + d, dim - d), (__m512bh)read_pairs(b + d, dim - d));
  return sum;
}

// Writes the first `left` (at most kWidth) elements, rounded.
PDS_INLINE void write_rounded(uint16_t* p, vfloat x, int64_t left) {
  const __mmask16 mask = static_cast<__mmask16>(left >= kWidth ? 0xFFFF : (1 << left) - 1);
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

// columns[k][i] = rows[i][k] of units: `lanes` rows of `depth`, both multiples of 16.
inline void transpose_units(const Bf16Pair* rows, int64_t lanes, int64_t depth, int64_t column_ld, Bf16Pair* columns) {
  for (int64_t i = 0; i < lanes; i += kWidth)
    for (int64_t k = 0; k < depth; k += 4) {
      vfloat quad[4];
      transpose_quad(reinterpret_cast<const float*>(rows + i * depth + k), depth, quad);
      for (int c = 0; c < 4; ++c) store(reinterpret_cast<float*>(columns + (k + c) * column_ld + i), quad[c]);
    }
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

// Natural logarithm of positive finite numbers, to about 2 ulp; NaN for NaN.
PDS_INLINE vfloat log_of_positive(vfloat x) {
  const __m512 mantissa = _mm512_maskz_getmant_ps(0xFFFF, (__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const vfloat exponent = (vfloat)_mm512_maskz_getexp_ps(0xFFFF, _mm512_div_ps((__m512)x, mantissa));
  const vfloat m = (vfloat)mantissa, s = (m - splat(1.f)) / (m + splat(1.f)), square = s * s;
  vfloat p = splat(1.f / 9);
  p = p * square + splat(1.f / 7);
  p = p * square + splat(1.f / 5);
  p = p * square + splat(1.f / 3);
  p = p * square + splat(1.f);
  return exponent * splat(0.693147181f) + splat(2.f) * s * p;
}

// Sizes in units. Rows of a left operand are padded to whole tiles.
struct PairSizes {
  int64_t depth, score_depth, value_rows;

  explicit PairSizes(const TimestepAttentionArgs& a)
      : depth(round_up(a.dim, 2 * kPairStep) / 2), score_depth(a.tau.data && !a.rotary ? 2 * depth : depth),
        value_rows(round_up(2 * depth, AmxEngine::kRows)) {}
};

// The keys of one head that the mask keeps.
struct PairKeys {
  int64_t count = 0, depth = 0;   // depth: pairs of keys, padded
  int32_t* index;                 // [count] position of each
  float* bias;                    // [count] per-key term, times log2(e)
  Bf16Pair* rows;                 // [count][score_depth] k, tau; or the turned k
};

inline int64_t count_keys(const TimestepAttentionArgs& a, int64_t b) {
  if (!a.key_mask) return a.keys;
  const uint8_t* mask = a.key_mask + b * a.keys;
  return a.keys - std::count(mask, mask + a.keys, uint8_t{0});
}

inline void gather_key_rows(const TimestepAttentionArgs& a, const PairSizes& s, int64_t b, int64_t h, PairKeys& keys) {
  const uint16_t *u = head_row<uint16_t>(a.u, h, a.dim), *w = head_row<uint16_t>(a.w, h, a.dim);
  int64_t at = 0;
  for (int64_t j = 0; j < a.keys; ++j) {
    if (a.key_mask && !a.key_mask[b * a.keys + j]) continue;
    const uint16_t* k = row_of<uint16_t>(a.k, b, j, h);
    const uint16_t* tau = a.tau.data ? tau_row<uint16_t>(a, b, j, h) : nullptr;
    Bf16Pair* row = keys.rows + at * s.score_depth;
    copy_row(k, a.dim, s.depth, a.rotary ? tau : nullptr, row);
    vfloat dot{};
    if (u) dot = multiply_rows(dot, k, u, a.dim);
    if (tau && !a.rotary) {
      copy_row(tau, a.dim, s.depth, nullptr, row + s.depth);
      if (w) dot = multiply_rows(dot, tau, w, a.dim);
    }
    keys.bias[at] = u || w ? kLog2e * a.scale * add_lanes(dot) : 0.f;
    keys.index[at++] = static_cast<int32_t>(j);
  }
  keys.count = at;
  keys.depth = round_up(at, 2 * kPairStep) / 2;
}

// The queries i0 .. i0+n-1 of one head, [lanes][depth], zero rows from n on.
inline void gather_queries(const TimestepAttentionArgs& a, int64_t depth, int64_t b, int64_t h, int64_t i0, int64_t n,
                           int64_t lanes, Bf16Pair* rows) {
  for (int64_t i = 0; i < n; ++i)
    copy_row(row_of<uint16_t>(a.q, b, i0 + i, h), a.dim, depth, a.rotary ? tau_row<uint16_t>(a, b, i0 + i, h) : nullptr,
             rows + i * depth);
  std::memset(rows + n * depth, 0, (lanes - n) * depth * sizeof(Bf16Pair));
}

// [score_depth][lanes]: the transposed queries, and once more below for the time's features.
inline void transpose_queries(const PairSizes& s, const Bf16Pair* rows, int64_t lanes, Bf16Pair* columns) {
  for (int64_t k = 0; k < s.score_depth; k += s.depth) transpose_units(rows, lanes, s.depth, lanes, columns + k * lanes);
}

}  // namespace PDS_ISA
}  // namespace pds
#endif
