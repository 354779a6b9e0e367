// Register tiles of a matrix product, shared by the ops that fuse something into one. A tile is kTileRows rows by kPanel
// columns of C. What is multiplied comes in "units" along the summed dimension: one float, or (with AVX-512 BF16) a pair
// of bfloat16 in 32 bits, lower half first. Sums are float32. Include it from op files only (it needs PDS_ISA).
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace pds {
namespace PDS_ISA {

#if PDS_WIDTH == 16 || defined(__aarch64__)
constexpr int kTileRows = 12;   // 24 accumulators of 32 registers
#else
constexpr int kTileRows = 6;    // 12 of 16
#endif
constexpr int kPanel = 2 * kWidth;

using Bf16Pair = uint32_t;
template <typename Unit>
constexpr int kUnit = 1;   // elements per unit
template <>
constexpr int kUnit<Bf16Pair> = 2;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Uninitialised memory on a cache-line boundary.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : data_(size > 0 ? static_cast<T*>(::operator new[](size * sizeof(T), kAlign)) : nullptr) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
};

PDS_INLINE vfloat multiply_add(vfloat c, float a, const float* b) { return c + splat(a) * load(b); }
#if defined(__AVX512BF16__)
PDS_INLINE vfloat multiply_add(vfloat c, Bf16Pair a, const Bf16Pair* b) {
  const __m512i pairs = _mm512_set1_epi32(static_cast<int>(a));
  return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)pairs, (__m512bh)_mm512_loadu_si512(b));
}
#endif

// c[i][:] += sum over k < depth of a[i * a_row + k * a_step] * b[k * b_step + (0 .. kPanel-1)].
template <typename Unit>
PDS_INLINE void accumulate_tile(int64_t depth, const Unit* a, int64_t a_row, int64_t a_step, const Unit* b,
                                int64_t b_step, vfloat (&c)[kTileRows][2]) {
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      c[i][0] = multiply_add(c[i][0], a[i * a_row], b);
      c[i][1] = multiply_add(c[i][1], a[i * a_row], b + kWidth);
    }
  }
}

// A row of n elements as units, padded with zeros to `padded` elements.
PDS_INLINE void pack_row(const float* row, int64_t n, int64_t padded, float* out) {
  std::memcpy(out, row, n * sizeof(float));
  std::memset(out + n, 0, (padded - n) * sizeof(float));
}
PDS_INLINE void pack_row(const uint16_t* row, int64_t n, int64_t padded, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(row[i]);
  std::memset(out + n, 0, (padded - n) * sizeof(float));
}
PDS_INLINE void pack_row(const uint16_t* row, int64_t n, int64_t padded, Bf16Pair* out) {
  std::memcpy(out, row, n * sizeof(uint16_t));
  std::memset(reinterpret_cast<uint16_t*>(out) + n, 0, (padded - n) * sizeof(uint16_t));
}

// Transposes kPanel rows of `depth` units (row i at rows + i * depth) into [depth, kPanel]: one load of a tile's b
// then covers consecutive columns.
template <typename Unit>
PDS_INLINE void pack_panel(const Unit* rows, int64_t depth, Unit* panel) {
  for (int64_t k = 0; k < depth; ++k)
    for (int i = 0; i < kPanel; ++i) panel[k * kPanel + i] = rows[i * depth + k];
}

}  // namespace PDS_ISA
}  // namespace pds
