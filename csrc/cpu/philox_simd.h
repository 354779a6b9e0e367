// Philox blocks and their normals, kWidth blocks at a time, with the bits of common/philox.h on every instruction set.
// Compilers do not vectorise the 32 x 32 -> 64 multiplications well, so AVX2 and AVX-512 are written in intrinsics; the
// baseline runs the scalar functions. Include it from files compiled with -ffp-contract=off only.
#pragma once
#include "common/philox.h"
#include "cpu/simd.h"

#if PDS_WIDTH >= 8
// GCC 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

namespace pds {
namespace PDS_ISA {

constexpr int kBlocks = PDS_WIDTH;           // Philox blocks per call
constexpr int kBlockNormals = 4 * kBlocks;   // normals per call: four vectors
constexpr int kRounds = 10;

// What all blocks of one call share: counter words 1 to 3, and the key of each round.
struct Philox {
  uint32_t counter1, counter2, counter3;
  uint32_t key0[kRounds], key1[kRounds];

  PDS_INLINE explicit Philox(uint64_t seed) : counter1(0), counter2(0), counter3(0) {
    for (uint32_t round = 0; round < kRounds; ++round) {
      key0[round] = static_cast<uint32_t>(seed) + round * kPhiloxW0;
      key1[round] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxW1;
    }
  }
};

#if PDS_WIDTH == 16

typedef __m512i Words;
PDS_INLINE Words multiply(Words a, Words b) { return _mm512_mul_epu32(a, b); }
PDS_INLINE Words high_word(Words a) { return _mm512_srli_epi64(a, 32); }
PDS_INLINE Words xor3(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
PDS_INLINE Words splat_words(uint32_t x) { return _mm512_set1_epi64(x); }
PDS_INLINE Words add_words(Words a, Words b) { return _mm512_add_epi64(a, b); }
// Lanes in block order, and in the order in which pair_words leaves 16-byte blocks in place.
PDS_INLINE Words lane_order() { return _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0); }
PDS_INLINE Words paired_order() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
PDS_INLINE Words low_words(Words even, Words odd) {   // low halves of 64-bit lanes: odd's go to the upper halves
  return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
PDS_INLINE Words unpack_low(Words a, Words b) { return _mm512_unpacklo_epi64(a, b); }
PDS_INLINE Words unpack_high(Words a, Words b) { return _mm512_unpackhi_epi64(a, b); }
PDS_INLINE vfloat fused(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
PDS_INLINE vfloat square_root(vfloat a) { return (vfloat)_mm512_sqrt_ps((__m512)a); }
PDS_INLINE vfloat unsigned_to_float(vint a) { return (vfloat)_mm512_cvtepu32_ps((__m512i)a); }
PDS_INLINE vfloat signed_to_float(vint a) { return (vfloat)_mm512_cvtepi32_ps((__m512i)a); }
PDS_INLINE vint shift_right_signed(vint a, int bits) { return (vint)_mm512_srai_epi32((__m512i)a, bits); }
// The low words of 16 blocks (two vectors of 64-bit lanes) side by side.
PDS_INLINE vint gather_low(Words first, Words second) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return (vint)_mm512_permutex2var_epi32(first, even, second);
}
PDS_INLINE void swap_where(vint choose, vfloat& a, vfloat& b) {   // where bit 30 of `choose` is set
  const __mmask16 mask = _mm512_test_epi32_mask((__m512i)choose, _mm512_set1_epi32(0x40000000));
  const vfloat old = a;
  a = (vfloat)_mm512_mask_blend_ps(mask, (__m512)a, (__m512)b);
  b = (vfloat)_mm512_mask_blend_ps(mask, (__m512)b, (__m512)old);
}
PDS_INLINE vfloat xor_sign(vfloat a, vint sign_of) {   // a with its sign flipped where sign_of is negative
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return (vfloat)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)sign_of, sign, 0x78);
}
// Normal i of block j, n[i][j], to element order (4 j + i).
PDS_INLINE void interleave(vfloat n[4]) {
  const __m512 a = _mm512_unpacklo_ps((__m512)n[0], (__m512)n[1]), b = _mm512_unpackhi_ps((__m512)n[0], (__m512)n[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)n[2], (__m512)n[3]), d = _mm512_unpackhi_ps((__m512)n[2], (__m512)n[3]);
  const __m512 q0 = (__m512)_mm512_unpacklo_pd((__m512d)a, (__m512d)c);   // blocks 0, 4, 8, 12
  const __m512 q1 = (__m512)_mm512_unpackhi_pd((__m512d)a, (__m512d)c);   // blocks 1, 5, 9, 13
  const __m512 q2 = (__m512)_mm512_unpacklo_pd((__m512d)b, (__m512d)d);
  const __m512 q3 = (__m512)_mm512_unpackhi_pd((__m512d)b, (__m512d)d);
  const __m512 r0 = _mm512_shuffle_f32x4(q0, q1, 0x88), r1 = _mm512_shuffle_f32x4(q2, q3, 0x88);   // 0 8 1 9, 2 10 3 11
  const __m512 r2 = _mm512_shuffle_f32x4(q0, q1, 0xDD), r3 = _mm512_shuffle_f32x4(q2, q3, 0xDD);   // 4 12 5 13, 6 ...
  n[0] = (vfloat)_mm512_shuffle_f32x4(r0, r1, 0x88);
  n[1] = (vfloat)_mm512_shuffle_f32x4(r2, r3, 0x88);
  n[2] = (vfloat)_mm512_shuffle_f32x4(r0, r1, 0xDD);
  n[3] = (vfloat)_mm512_shuffle_f32x4(r2, r3, 0xDD);
}

#elif PDS_WIDTH == 8

typedef __m256i Words;
PDS_INLINE Words multiply(Words a, Words b) { return _mm256_mul_epu32(a, b); }
PDS_INLINE Words high_word(Words a) { return _mm256_srli_epi64(a, 32); }
PDS_INLINE Words xor3(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
PDS_INLINE Words splat_words(uint32_t x) { return _mm256_set1_epi64x(x); }
PDS_INLINE Words add_words(Words a, Words b) { return _mm256_add_epi64(a, b); }
PDS_INLINE Words lane_order() { return _mm256_set_epi64x(3, 2, 1, 0); }
PDS_INLINE Words paired_order() { return _mm256_set_epi64x(3, 1, 2, 0); }
PDS_INLINE Words low_words(Words even, Words odd) {
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
PDS_INLINE Words unpack_low(Words a, Words b) { return _mm256_unpacklo_epi64(a, b); }
PDS_INLINE Words unpack_high(Words a, Words b) { return _mm256_unpackhi_epi64(a, b); }
PDS_INLINE vfloat fused(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
PDS_INLINE vfloat square_root(vfloat a) { return (vfloat)_mm256_sqrt_ps((__m256)a); }
// high * 2^16 is exact and so is low: the fma rounds once, as the direct conversion does.
PDS_INLINE vfloat unsigned_to_float(vint a) {
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32((__m256i)a, 16));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256((__m256i)a, _mm256_set1_epi32(0xFFFF)));
  return (vfloat)_mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
}
PDS_INLINE vfloat signed_to_float(vint a) { return (vfloat)_mm256_cvtepi32_ps((__m256i)a); }
PDS_INLINE vint shift_right_signed(vint a, int bits) { return (vint)_mm256_srai_epi32((__m256i)a, bits); }
PDS_INLINE vint gather_low(Words first, Words second) {
  const __m256i mixed = (__m256i)_mm256_shuffle_ps((__m256)first, (__m256)second, 0x88);   // 0 1 4 5 | 2 3 6 7
  return (vint)_mm256_permute4x64_epi64(mixed, 0xD8);
}
PDS_INLINE void swap_where(vint choose, vfloat& a, vfloat& b) {   // where bit 30 of `choose` is set
  const __m256 mask = (__m256)_mm256_slli_epi32((__m256i)choose, 1);
  const vfloat old = a;
  a = (vfloat)_mm256_blendv_ps((__m256)a, (__m256)b, mask);
  b = (vfloat)_mm256_blendv_ps((__m256)b, (__m256)old, mask);
}
PDS_INLINE vfloat xor_sign(vfloat a, vint sign_of) {
  const __m256i sign = _mm256_and_si256((__m256i)sign_of, _mm256_set1_epi32(static_cast<int>(0x80000000u)));
  return (vfloat)_mm256_xor_si256((__m256i)a, sign);
}
PDS_INLINE void interleave(vfloat n[4]) {
  const __m256 a = _mm256_unpacklo_ps((__m256)n[0], (__m256)n[1]), b = _mm256_unpackhi_ps((__m256)n[0], (__m256)n[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)n[2], (__m256)n[3]), d = _mm256_unpackhi_ps((__m256)n[2], (__m256)n[3]);
  const __m256 q0 = (__m256)_mm256_unpacklo_pd((__m256d)a, (__m256d)c);   // blocks 0, 4
  const __m256 q1 = (__m256)_mm256_unpackhi_pd((__m256d)a, (__m256d)c);   // blocks 1, 5
  const __m256 q2 = (__m256)_mm256_unpacklo_pd((__m256d)b, (__m256d)d);
  const __m256 q3 = (__m256)_mm256_unpackhi_pd((__m256d)b, (__m256d)d);
  n[0] = (vfloat)_mm256_permute2f128_ps(q0, q1, 0x20);
  n[1] = (vfloat)_mm256_permute2f128_ps(q2, q3, 0x20);
  n[2] = (vfloat)_mm256_permute2f128_ps(q0, q1, 0x31);
  n[3] = (vfloat)_mm256_permute2f128_ps(q2, q3, 0x31);
}

#endif

#if PDS_WIDTH >= 8

constexpr int kHalf = PDS_WIDTH / 2;   // blocks in one vector of 64-bit lanes

// Ten rounds on two vectors of blocks at once (two chains hide the latency of the multiplication). Word i of the block in
// lane l of half h ends in the low half of that lane of words[i][h]; the high halves hold rubbish.
PDS_INLINE void philox_rounds(const Philox& philox, const Words first[2], Words words[4][2]) {
  for (int h = 0; h < 2; ++h) {
    words[0][h] = first[h];
    words[1][h] = splat_words(philox.counter1);
    words[2][h] = splat_words(philox.counter2);
    words[3][h] = splat_words(philox.counter3);
  }
  const Words m0 = splat_words(kPhiloxM0), m1 = splat_words(kPhiloxM1);
#pragma GCC unroll 10
  for (int round = 0; round < kRounds; ++round) {
    const Words k0 = splat_words(philox.key0[round]), k1 = splat_words(philox.key1[round]);
    for (int h = 0; h < 2; ++h) {
      const Words p0 = multiply(words[0][h], m0), p1 = multiply(words[2][h], m1);
      words[0][h] = xor3(high_word(p1), words[1][h], k0);
      words[2][h] = xor3(high_word(p0), words[3][h], k1);
      words[1][h] = p1;
      words[3][h] = p0;
    }
  }
}

// words[i][j] = word i of block first + j.
PDS_INLINE void philox_blocks(const Philox& philox, uint32_t first, vint words[4]) {
  const Words start[2] = {add_words(splat_words(first), lane_order()),
                          add_words(splat_words(first + kHalf), lane_order())};
  Words wide[4][2];
  philox_rounds(philox, start, wide);
  for (int i = 0; i < 4; ++i) words[i] = gather_low(wide[i][0], wide[i][1]);
}

PDS_INLINE vfloat normal_radii(vint words) {
  constexpr float w[8] = PDS_LOG_W;
  const vfloat u = fused(unsigned_to_float(words), splat(kTwoToMinus32), splat(kTwoToMinus33));
  const vint exponent = shift_right_signed(as_int(u) - splat(static_cast<int32_t>(kSqrtHalfBits)), 23);
  const vfloat f = as_float(as_int(u) - (exponent << 23)) + splat(-1.0f);
  vfloat poly = splat(w[7]);
#pragma GCC unroll 7
  for (int i = 6; i >= 0; --i) poly = fused(poly, f, splat(w[i]));
  const vfloat mantissa_part = fused(f * f, poly, f * splat(-2.0f));
  return square_root(fused(signed_to_float(exponent), splat(kMinusTwoLn2), mantissa_part));
}

PDS_INLINE void normal_pairs(vint radius_words, vint angle_words, vfloat& first, vfloat& second) {
  const vfloat t = signed_to_float(angle_words << 2) * splat(kAngleUnit);
  const vfloat z = t * t;
  const vfloat sin_poly = fused(fused(splat(kSin2), z, splat(kSin1)), z, splat(kSin0));
  vfloat sine = fused(t * z, sin_poly, t);
  const vfloat cos_poly = fused(fused(splat(kCos2), z, splat(kCos1)), z, splat(kCos0));
  vfloat cosine = fused(z * z, cos_poly, fused(z, splat(-0.5f), splat(1.0f)));
  const vfloat radius = xor_sign(normal_radii(radius_words), angle_words);
  swap_where(angle_words, sine, cosine);
  first = radius * sine;
  second = radius * cosine;
}

// The kBlockNormals normals of blocks first, first + 1, ... in element order.
PDS_INLINE void normal_vectors(const Philox& philox, uint32_t first, vfloat normals[4]) {
  vint words[4];
  philox_blocks(philox, first, words);
  normal_pairs(words[0], words[1], normals[0], normals[1]);
  normal_pairs(words[2], words[3], normals[2], normals[3]);
  interleave(normals);
}

#else

PDS_INLINE vfloat fused(vfloat a, vfloat b, vfloat c) {
  vfloat out;
  for (int i = 0; i < kWidth; ++i) out[i] = exact_fma(a[i], b[i], c[i]);
  return out;
}

PDS_INLINE void philox_block(const Philox& philox, uint32_t group, uint32_t words[4]) {
  words[0] = group;
  words[1] = philox.counter1;
  words[2] = philox.counter2;
  words[3] = philox.counter3;
  philox10(words, philox.key0[0], philox.key1[0]);
}

PDS_INLINE void philox_blocks(const Philox& philox, uint32_t first, vint words[4]) {
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t one[4];
    philox_block(philox, first + block, one);
    for (int i = 0; i < 4; ++i) words[i][block] = static_cast<int32_t>(one[i]);
  }
}

PDS_INLINE void normal_vectors(const Philox& philox, uint32_t first, vfloat normals[4]) {
  static_assert(kWidth == 4, "one block fills one vector");
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t words[4];
    float one[4];
    philox_block(philox, first + block, words);
    normals4(words, one);
    std::memcpy(&normals[block], one, sizeof one);
  }
}

#endif

}  // namespace PDS_ISA
}  // namespace pds
