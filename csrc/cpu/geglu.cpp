// GEGLU, the linear half times GELU of the gate with the exact normal distribution function, and its gradient.
#include "common/geglu.h"

#include <algorithm>

#include "cpu/gelu.h"
#include "cpu/parallel.h"

namespace pds {
namespace PDS_ISA {
namespace {

constexpr int64_t kGrainElements = 8192;
constexpr int64_t kUnit = 64;   // ranges of threads begin at multiples of it

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
