// The normal distribution function, on which GELU rests. Include it from op files only (it needs PDS_ISA).
#pragma once
#include "cpu/simd.h"

#if PDS_X86
#include <immintrin.h>
#endif

namespace pds {
namespace PDS_ISA {

struct Normal {
  vfloat cdf, bell;   // Phi(x) and exp(-x^2 / 2)
};

template <int n>
PDS_INLINE vfloat polynomial(vfloat x, const float (&c)[n]) {   // highest power first
  vfloat p = splat(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < n; ++i) p = p * x + splat(c[i]);
  return p;
}

constexpr float kMagic = 12582912.f;   // 1.5 * 2^23: adding it rounds to the nearest integer

// p * 2^n for p near 1 and shifted = kMagic + n; 0 where `gone`.
PDS_INLINE vfloat scale(vfloat p, vfloat shifted, vint gone) {
  return as_float(gone ? splat(int32_t{0}) : as_int(p) + (as_int(shifted) << 23));
}

// Phi from its tail Phi(-|x|) = bell(x) M(|x|), where the smooth M is a polynomial in u over |x| + k. So small values
// keep their relative accuracy, unlike those of 1 + erf. bell is 0 from |x| = 13.2 on.
PDS_INLINE Normal from_tail(vfloat x, vfloat tail, vfloat bell) {
  return {select(x > splat(0.f), splat(1.f) - tail, tail), bell};
}
PDS_INLINE vfloat magnitude(vfloat x) { return as_float(as_int(x) & splat(int32_t{0x7FFFFFFF})); }

// Relative error of both about 3e-7. x^2 is split into an exact head and a rest: rounded to one float, its error would
// become one of up to 5e-6 in the exponential.
PDS_INLINE Normal normal(vfloat x, float) {
  constexpr float exp_series[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                  5.0000001201e-1f};
  constexpr float tail_series[] = {-2.70633202e-4f, -9.09029681e-4f, 1.07712019e-3f, 6.92789722e-3f, -1.04796616e-2f,
                                   -4.72569056e-2f, 2.30019286e-1f, -5.0933224e-1f, 7.29083657e-1f};
  const vfloat head = as_float(as_int(x) & splat(int32_t{~0xFFF})), square = head * head;
  const vfloat shifted = splat(kMagic) - square * splat(0.72134752f);   // log2(e) / 2
  const vfloat n = shifted - splat(kMagic);
  vfloat r = square * splat(-0.5f) - n * splat(0.693359375f);   // exact
  r = r + (n * splat(2.12194440e-4f) - (x - head) * ((x + head) * splat(0.5f)));
  const vfloat e = polynomial(r, exp_series) * (r * r) + (r + splat(1.f));
  const vfloat bell = scale(e, shifted, square > splat(174.f));
  const vfloat inverse = splat(1.f) / (magnitude(x) + splat(3.f));
  const vfloat u = splat(1.f) - splat(6.f) * inverse;   // (|x| - 3) / (|x| + 3), without its NaN at infinity
  return from_tail(x, polynomial(u, tail_series) * inverse * bell, bell);
}

PDS_INLINE vfloat reciprocal(vfloat x) {
#if PDS_WIDTH == 16
  x = vmin(x, splat(1e30f));   // infinity would give infinity times 0
  const vfloat guess = (vfloat)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
  return guess * (splat(2.f) - x * guess);
#else
  return splat(1.f) / x;
#endif
}

// For bfloat16, whose squares are exact: relative error about 1e-5, a two-hundredth of the rounding of the result.
PDS_INLINE Normal normal(vfloat x, uint16_t) {
  constexpr float exp2_series[] = {9.57010128e-3f, 5.59178591e-2f, 2.40247443e-1f, 6.93121791e-1f, 9.99999285e-1f};
  constexpr float tail_series[] = {-3.4091264e-2f, 1.13290757e-1f, -2.52920777e-1f, 4.46206093e-1f, -6.40270412e-1f,
                                   7.6323545e-1f};
  const vfloat size = magnitude(x), square = x * x;
  const vfloat shifted = splat(kMagic) - square * splat(0.72134752f);
  const vfloat n = shifted - splat(kMagic);
  const vfloat fraction = splat(0.f) - (square * splat(0.72134752f) + n);
  const vfloat bell = scale(polynomial(fraction, exp2_series), shifted, square > splat(174.f));
  const vfloat inverse = reciprocal(size + splat(4.5f));
  const vfloat u = splat(1.f) - splat(9.f) * inverse;   // (|x| - 4.5) / (|x| + 4.5)
  return from_tail(x, polynomial(u, tail_series) * inverse * bell, bell);
}

}  // namespace PDS_ISA
}  // namespace pds
