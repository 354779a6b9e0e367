// A float vector as wide as the instruction set, on GCC vector extensions: one source, compiled once per set. The few
// operations that the extensions lack (max, blends, conversions, reductions) are here. Include it from op files only
// (it needs PDS_ISA).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define PDS_WIDTH 16
#elif defined(__AVX2__)
#define PDS_WIDTH 8
#else
#define PDS_WIDTH 4
#endif

namespace pds {
namespace PDS_ISA {

constexpr int kWidth = PDS_WIDTH;
typedef float vfloat __attribute__((vector_size(PDS_WIDTH * 4)));
typedef int32_t vint __attribute__((vector_size(PDS_WIDTH * 4)));
typedef uint32_t vuint __attribute__((vector_size(PDS_WIDTH * 4)));
typedef float vfloat_unaligned __attribute__((vector_size(PDS_WIDTH * 4), aligned(4)));

#define PDS_INLINE inline __attribute__((always_inline))

PDS_INLINE vfloat splat(float x) { return x - vfloat{}; }
PDS_INLINE vint splat(int32_t x) { return x - vint{}; }
PDS_INLINE vfloat load(const float* p) { return *reinterpret_cast<const vfloat_unaligned*>(p); }
PDS_INLINE void store(float* p, vfloat x) { *reinterpret_cast<vfloat_unaligned*>(p) = x; }
PDS_INLINE vfloat as_float(vint x) { return reinterpret_cast<vfloat>(x); }
PDS_INLINE vint as_int(vfloat x) { return reinterpret_cast<vint>(x); }
PDS_INLINE vfloat select(vint mask, vfloat yes, vfloat no) { return mask ? yes : no; }
PDS_INLINE vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }
PDS_INLINE vfloat vmin(vfloat a, vfloat b) { return a < b ? a : b; }

// The first n (<= kWidth) elements; the rest reads as `fill`. Never touches memory past p + n.
PDS_INLINE vfloat load_part(const float* p, int n, float fill = 0.f) {
  vfloat x = splat(fill);
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
PDS_INLINE void store_part(float* p, vfloat x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}

PDS_INLINE float sum(vfloat x) {
  float total = 0.f;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}
PDS_INLINE float max(vfloat x) {
  float best = x[0];
  for (int i = 1; i < kWidth; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// 2^x for x <= 0, to 1.5e-7; 1 for 0, 0 (or subnormal) below -125.9 and for -inf, NaN for NaN.
PDS_INLINE vfloat exp2_of_nonpositive(vfloat x) {   // 2^x = 2^floor(x) 2^f
#if PDS_WIDTH == 16
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
  const vfloat magic = splat(12582912.f);    // 1.5 * 2^23: adding it rounds to the nearest integer
  const vfloat shifted = (x - splat(0.5f)) + magic, f = x - (shifted - magic);
#endif
  vfloat p = splat(1.8671300e-3f);   // least largest relative error on [0, 1]
  p = p * f + splat(9.0170307e-3f);
  p = p * f + splat(5.5799913e-2f);
  p = p * f + splat(2.4016444e-1f);
  p = p * f + splat(6.9315130e-1f);
  p = p * f + splat(1.f);
#if PDS_WIDTH == 16
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const vfloat scaled = as_float(as_int(p) + (as_int(shifted) << 23));   // magic's low bits shift out
  return select(x < splat(-125.9f), vfloat{}, scaled);
#endif
}

constexpr float kLog2e = 1.44269504f;

// exp(x) for x <= 0, to 1.5e-7 + 6e-8 |x|; otherwise as exp2_of_nonpositive.
PDS_INLINE vfloat exp_of_nonpositive(vfloat x) { return exp2_of_nonpositive(x * splat(kLog2e)); }

// Natural logarithm of positive finite numbers, to about 2 ulp; NaN for NaN.
PDS_INLINE vfloat log_of_positive(vfloat x) {
  const vint exponent = (as_int(x) - splat(0x3F400000)) >> 23;   // of 2 that leaves 0.75 .. 1.5
  const vfloat m = as_float(as_int(x) - (exponent << 23)), s = (m - splat(1.f)) / (m + splat(1.f)), square = s * s;
  vfloat p = splat(1.f / 9);
  p = p * square + splat(1.f / 7);
  p = p * square + splat(1.f / 5);
  p = p * square + splat(1.f / 3);
  p = p * square + splat(1.f);
  const vfloat log = __builtin_convertvector(exponent, vfloat) * splat(0.693147181f) + splat(2.f) * s * p;
  return select(x == x, log, x);
}

// bfloat16 <-> float32, round to nearest even; NaN stays NaN.
typedef uint16_t vbf16 __attribute__((vector_size(PDS_WIDTH * 2)));
typedef uint16_t vbf16_unaligned __attribute__((vector_size(PDS_WIDTH * 2), aligned(2)));
PDS_INLINE vfloat load(const uint16_t* p) {
  const vbf16 raw = *reinterpret_cast<const vbf16_unaligned*>(p);
  return reinterpret_cast<vfloat>(__builtin_convertvector(raw, vuint) << 16);
}
PDS_INLINE void store(uint16_t* p, vfloat x) {
  const vuint bits = reinterpret_cast<vuint>(x);
  const vuint rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const vuint nan = (bits >> 16) | 0x40u;
  const vuint out = (x == x) ? rounded : nan;
  *reinterpret_cast<vbf16_unaligned*>(p) = __builtin_convertvector(out, vbf16);
}
PDS_INLINE float to_float(float x) { return x; }
PDS_INLINE float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
PDS_INLINE void from_float(float& out, float x) { out = x; }
PDS_INLINE void from_float(uint16_t& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out = (x == x) ? static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)
                 : static_cast<uint16_t>((bits >> 16) | 0x40u);
}

}  // namespace PDS_ISA
}  // namespace pds
