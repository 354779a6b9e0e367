// GEGLU, the linear half times GELU of the gate with the exact normal distribution function, and its gradient.
#include "common/geglu.h"

#include <algorithm>

#if PDS_X86
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pds {
namespace PDS_ISA {
namespace {

constexpr int64_t kGrainElements = 8192;
constexpr int64_t kUnit = 64;   // ranges of threads begin at multiples of it

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

// bfloat16 without simd.h's test for NaN: those that come up here have zeros in their low half, so that rounding cannot
// carry them over into another number.
PDS_INLINE void put(float* p, vfloat x) { store(p, x); }
PDS_INLINE void put(uint16_t* p, vfloat x) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &rounded, sizeof rounded);
#else
  const vuint bits = reinterpret_cast<vuint>(x);
  const vuint rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  *reinterpret_cast<vbf16_unaligned*>(p) = __builtin_convertvector(rounded, vbf16);
#endif
}
PDS_INLINE vfloat get(const float* p) { return load(p); }
PDS_INLINE vfloat get(const uint16_t* p) {
#if PDS_WIDTH == 16   // one instruction, for which GCC 12 takes four
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<vfloat>((vuint)_mm512_maskz_cvtepu16_epi32(0xFFFF, raw) << 16);
#else
  return load(p);
#endif
}

PDS_INLINE vfloat gelu_slope(vfloat x, Normal at) { return at.cdf + x * (at.bell * splat(0.39894228f)); }

template <typename T>
struct Pointers {
  const T *grad, *a, *gate;    // no grad in the forward kernel
  T *out, *out_gate;           // no out_gate in the forward kernel; in the backward kernel the gradients of a and gate
  PDS_INLINE Pointers at(int64_t i) const { return {grad + i, a + i, gate + i, out + i, out_gate + i}; }
};

struct Geglu {
  static constexpr bool kBackward = false;
  template <typename T>
  static PDS_INLINE void step(const Pointers<T>& p) {
    const vfloat x = get(p.gate);
    put(p.out, get(p.a) * (x * normal(x, T{}).cdf));
  }
};
struct GegluBackward {
  static constexpr bool kBackward = true;
  template <typename T>
  static PDS_INLINE void step(const Pointers<T>& p) {
    const vfloat x = get(p.gate), grad = get(p.grad), a = get(p.a);
    const Normal at = normal(x, T{});
    put(p.out, grad * (x * at.cdf));
    put(p.out_gate, grad * a * gelu_slope(x, at));
  }
};

// n neighbours of one row.
template <typename Op, typename T>
void segment(const Pointers<T>& p, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Op::step(p.at(i));
  if (i == n) return;
  const Pointers<T> rest = p.at(i);
  const int64_t left = n - i;
  T padded[5][kWidth] = {};
  if (Op::kBackward) std::copy(rest.grad, rest.grad + left, padded[0]);
  std::copy(rest.a, rest.a + left, padded[1]);
  std::copy(rest.gate, rest.gate + left, padded[2]);
  Op::step(Pointers<T>{padded[0], padded[1], padded[2], padded[3], padded[4]});
  std::copy(padded[3], padded[3] + left, rest.out);
  if (Op::kBackward) std::copy(padded[4], padded[4] + left, rest.out_gate);
}

// Threads share the elements, not the rows: one long row runs on all of them too.
template <typename Op, typename T>
void run(const GegluArgs& args) {
  const T* grad = static_cast<const T*>(args.grad);
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out);
  const int64_t columns = args.columns, total = args.rows * columns;
  parallel_ranges((total + kUnit - 1) / kUnit, kGrainElements / kUnit, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * kUnit, total);
    for (int64_t i = first * kUnit; i < end;) {
      const int64_t row = i / columns, n = std::min(end, (row + 1) * columns) - i;
      const T* a = x + i + row * columns;
      T* to = out + i + (Op::kBackward ? row * columns : 0);
      segment<Op>(Pointers<T>{Op::kBackward ? grad + i : a, a, a + columns, to, Op::kBackward ? to + columns : to}, n);
      i += n;
    }
  });
}

template <typename Op>
void run(const GegluArgs& args) { args.bf16 ? run<Op, uint16_t>(args) : run<Op, float>(args); }

}  // namespace

void geglu(const GegluArgs& args) { run<Geglu>(args); }
void geglu_backward(const GegluArgs& args) { run<GegluBackward>(args); }

}  // namespace PDS_ISA
}  // namespace pds
