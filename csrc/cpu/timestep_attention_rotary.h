// The rotary form of timestep attention: a token's row (c, s) of tau, whose halves need be no cosines and sines of an angle,
// turns each pair of neighbouring features of its q, k and v into (x1 c - x2 s, x2 c + x1 s), rounded to the tensors' type.
// With g the gradient of the turned row: dx1 = g1 c + g2 s, dx2 = g2 c - g1 s, dc = g1 x1 + g2 x2, ds = g2 x1 - g1 x2.
#pragma once
#include "cpu/simd.h"

#if PDS_X86
#include <immintrin.h>
#endif

namespace pds {
namespace PDS_ISA {

typedef float vhalf __attribute__((vector_size(PDS_WIDTH * 2)));   // a number for each pair of a vfloat
typedef float vhalf_unaligned __attribute__((vector_size(PDS_WIDTH * 2), aligned(4)));
typedef uint32_t vuint_half __attribute__((vector_size(PDS_WIDTH * 2)));
typedef uint16_t vbf16_half __attribute__((vector_size(PDS_WIDTH), aligned(2)));

PDS_INLINE vhalf load_half(const float* p) { return *reinterpret_cast<const vhalf_unaligned*>(p); }
PDS_INLINE vhalf load_half(const uint16_t* p) {
  const vbf16_half raw = *reinterpret_cast<const vbf16_half*>(p);
  return reinterpret_cast<vhalf>(__builtin_convertvector(raw, vuint_half) << 16);
}
// Of a row with `left` numbers to go; the rest reads as zero.
template <typename T>
PDS_INLINE vhalf read_half(const T* p, int64_t left) {
  if (left >= kWidth / 2) return load_half(p);
  vhalf x{};
  for (int i = 0; i < left; ++i) x[i] = to_float(p[i]);
  return x;
}

// (a, b, ...) -> (a, a, b, b, ...)
PDS_INLINE vfloat twice(vhalf x) {
#if PDS_WIDTH == 16
  const __m512i lanes = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return (vfloat)_mm512_permutexvar_ps(lanes, _mm512_castps256_ps512((__m256)x));
#elif PDS_WIDTH == 8
  const __m256i lanes = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
  return (vfloat)_mm256_permutevar8x32_ps(_mm256_castps128_ps256((__m128)x), lanes);
#else
  return vfloat{x[0], x[0], x[1], x[1]};
#endif
}

// (a, b, c, d, ...) -> (a + b, c + d, ...)
PDS_INLINE vhalf add_neighbours(vfloat x) {
#if PDS_WIDTH == 16
  const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512 sums = _mm512_add_ps((__m512)x, _mm512_permute_ps((__m512)x, 0xB1));
  return (vhalf)_mm512_castps512_ps256(_mm512_permutexvar_ps(even, sums));
#elif PDS_WIDTH == 8
  const __m128 low = _mm256_castps256_ps128((__m256)x), high = _mm256_extractf128_ps((__m256)x, 1);
  return (vhalf)_mm_hadd_ps(low, high);
#else
  return vhalf{x[0] + x[1], x[2] + x[3]};
#endif
}

// (a, b, c, d, ...) -> (b, a, d, c, ...)
PDS_INLINE vfloat swap_neighbours(vfloat x) {
  vint lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i ^ 1;
  return __builtin_shuffle(x, lanes);
}
// (a, b, c, d, ...) -> (-a, b, -c, d, ...)
PDS_INLINE vfloat negate_even(vfloat x) {
  vint sign;
  for (int i = 0; i < kWidth; ++i) sign[i] = i & 1 ? 0 : INT32_MIN;
  return as_float(as_int(x) ^ sign);
}

PDS_INLINE vfloat round_to(const float*, vfloat x) { return x; }
PDS_INLINE vfloat round_to(const uint16_t*, vfloat x) {
  const vuint bits = reinterpret_cast<vuint>(x);
  const vuint rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  return x == x ? reinterpret_cast<vfloat>(rounded) : x;
}

// c and s of the features d .. d + kWidth - 1 of a row (s with the sign that its feature's neighbour takes).
struct Turn {
  vfloat c, s;

  template <typename T>
  PDS_INLINE Turn(const T* tau, int64_t dim, int64_t d)
      : c(twice(read_half(tau + d / 2, (dim - d) / 2))),
        s(negate_even(twice(read_half(tau + dim / 2 + d / 2, (dim - d) / 2)))) {}
};

// Features of a row, turned.
template <typename T>
PDS_INLINE vfloat turn(const T* tau, int64_t dim, int64_t d, vfloat x) {
  const Turn by(tau, dim, d);
  return round_to(tau, x * by.c + swap_neighbours(x) * by.s);
}

PDS_INLINE void add_half(float* to, vhalf x, int64_t left) {
  if (left >= kWidth / 2) *reinterpret_cast<vhalf_unaligned*>(to) = load_half(to) + x;
  else for (int i = 0; i < left; ++i) to[i] += x[i];
}

// From the gradient g of a turned row's features to that of the row's, x; adds to the gradient of tau.
template <typename T>
PDS_INLINE vfloat turn_back(const T* tau, int64_t dim, int64_t d, vfloat x, vfloat g, float* grad_tau) {
  const Turn by(tau, dim, d);
  add_half(grad_tau + d / 2, add_neighbours(g * x), (dim - d) / 2);
  add_half(grad_tau + dim / 2 + d / 2, add_neighbours(negate_even(g * swap_neighbours(x))), (dim - d) / 2);
  return g * by.c - swap_neighbours(g) * by.s;
}

}  // namespace PDS_ISA
}  // namespace pds
