// Counter-based normal noise, the same bits on every instruction set and device. (But for 16-bit types on CUDA: those
// kernels take the words from here and quicker normals.)
//
// Philox 4x32-10 (Salmon et al., SC 2011) followed by Box-Muller, written with integer operations and the IEEE-exact
// operations fma, mul, add, div and sqrt only. A compiler may not contract or reorder them: host files that include this
// header and want the contract are compiled with -ffp-contract=off.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PDS_HD __host__ __device__ __forceinline__
#else
#define PDS_HD inline __attribute__((always_inline))
#endif

namespace pds {

// One Philox block yields four 32-bit words, hence four normals. The counter is a coordinate, not a position in a
// stream, so a value depends on where it is used and on nothing else: not on the batch, the padding or the threads.
//   word 0: element group inside the sentence (element / 4)
//   word 1: stream << 24 | step     (stream tells apart the uses inside one op call, e.g. x0 noise and x_t noise)
//   word 2: sentence id
//   word 3: candidate
// The key is the 64-bit seed.
struct PhiloxCounter {
  uint32_t c[4];
};

enum class NoiseStream : uint32_t { x_t = 0, x_0 = 1, dropout = 2, initial = 3 };

PDS_HD uint32_t stream_word(NoiseStream stream, uint32_t step) {
  return (static_cast<uint32_t>(stream) << 24) | (step & 0xFFFFFFu);
}

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// The halves of a product of 64 bits. (Shifting the product down makes nvcc 13.0 add a zero to each upper half.)
PDS_HD void wide_product(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#ifdef __CUDA_ARCH__
  asm("{ .reg .u64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product; }"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
#endif
}

PDS_HD void philox10(uint32_t c[4], uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    uint32_t high0, low0, high1, low1;
    wide_product(kPhiloxM0, c[0], high0, low0);
    wide_product(kPhiloxM1, c[2], high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[2] = high0 ^ c[3] ^ k1;
    c[1] = low1;
    c[3] = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// --- Exact arithmetic: one rounding each, never contracted, on the host and on the device. ---

PDS_HD float exact_fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
PDS_HD float exact_mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
PDS_HD float exact_add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
PDS_HD float exact_div(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
PDS_HD float exact_sqrt(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}
PDS_HD uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}
PDS_HD float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// --- Box-Muller. Every implementation (this one, the SIMD one, ops/reference.py) evaluates these very steps. ---

// -2 ln(1 + f) = -2 f + f^2 W(f) for sqrt(1/2) <= 1 + f < sqrt(2), relative error 4e-8. Our own least-maximum fit.
#define PDS_LOG_W {0.9999996423721313f,  -0.6666786074638367f, 0.5000516176223755f,  -0.399270623922348f, \
                   0.3310374319553375f, -0.2976647913455963f, 0.28852564096450806f, -0.1796015501022339f}
// sin t = t + t z (S0 + S1 z + S2 z^2) and cos t = 1 - z / 2 + z^2 (C0 + C1 z + C2 z^2), z = t^2, |t| <= pi / 4, to 4e-9.
constexpr float kSin0 = -0.16666655242443085f, kSin1 = 0.008332177996635437f, kSin2 = -0.00019517296459525824f;
constexpr float kCos0 = 0.04166664555668831f, kCos1 = -0.001388736767694354f, kCos2 = 2.4438446416752413e-05f;
constexpr uint32_t kSqrtHalfBits = 0x3F3504F3u;   // sqrt(1/2) as a float
constexpr float kMinusTwoLn2 = -1.3862943649291992f;
constexpr float kTwoToMinus32 = 2.3283064365386963e-10f, kTwoToMinus33 = 1.1641532182693481e-10f;
constexpr float kAngleUnit = 3.65729529994141e-10f;   // (pi / 4) / 2^31

// sqrt(-2 ln u) with u = (word + 1/2) / 2^32: up to 6.76.
PDS_HD float normal_radius(uint32_t word) {
  const float w[8] = PDS_LOG_W;
  const float u = exact_fma(static_cast<float>(word), kTwoToMinus32, kTwoToMinus33);
  const uint32_t above = float_bits(u) - kSqrtHalfBits;
  const int32_t exponent = static_cast<int32_t>(above) >> 23;
  const float f = exact_add(bits_float(float_bits(u) - (static_cast<uint32_t>(exponent) << 23)), -1.0f);
  float poly = w[7];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 6; i >= 0; --i) poly = exact_fma(poly, f, w[i]);
  const float mantissa_part = exact_fma(exact_mul(f, f), poly, exact_mul(f, -2.0f));
  return exact_sqrt(exact_fma(static_cast<float>(exponent), kMinusTwoLn2, mantissa_part));
}

// Two normals from two words. The low 30 bits of `angle_word` are an angle in [-pi/4, pi/4); bit 30 swaps sine and cosine
// (mirrors at the diagonal) and bit 31 turns by pi: together the whole circle, without a range reduction.
PDS_HD void normal_pair(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  const float t = exact_mul(static_cast<float>(static_cast<int32_t>(angle_word << 2)), kAngleUnit);
  const float z = exact_mul(t, t);
  const float sin_poly = exact_fma(exact_fma(kSin2, z, kSin1), z, kSin0);
  const float sine = exact_fma(exact_mul(t, z), sin_poly, t);
  const float cos_poly = exact_fma(exact_fma(kCos2, z, kCos1), z, kCos0);
  const float cosine = exact_fma(exact_mul(z, z), cos_poly, exact_fma(z, -0.5f, 1.0f));
  const float radius = bits_float(float_bits(normal_radius(radius_word)) ^ (angle_word & 0x80000000u));
  const bool swap = (angle_word & 0x40000000u) != 0;
  first = exact_mul(radius, swap ? cosine : sine);
  second = exact_mul(radius, swap ? sine : cosine);
}

// The four normals of one Philox block, in element order.
PDS_HD void normals4(const uint32_t words[4], float normals[4]) {
  normal_pair(words[0], words[1], normals[0], normals[1]);
  normal_pair(words[2], words[3], normals[2], normals[3]);
}

}  // namespace pds
