// Small matrix products, shared by the ops that fuse something into one. What is multiplied comes in "units" along the
// summed dimension: one float, or (with AVX-512 BF16) a pair of bfloat16 in 32 bits, lower half first. Sums are float32.
// Include it from op files only (it needs PDS_ISA).
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/simd.h"

#if defined(__AVX2__)
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
  explicit Buffer(int64_t size = 0)
      : data_(size > 0 ? static_cast<T*>(::operator new[](size * sizeof(T), kAlign)) : nullptr) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
};

// Whether any element is above the bound.
PDS_INLINE bool any_above(vfloat x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
#else
  return max(x) > bound;
#endif
}

PDS_INLINE vfloat multiply_add(vfloat c, float a, const float* b) { return c + splat(a) * load(b); }
#if defined(__AVX512BF16__)
PDS_INLINE vfloat multiply_add(vfloat c, Bf16Pair a, const Bf16Pair* b) {
  const __m512i pairs = _mm512_set1_epi32(static_cast<int>(a));
  return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)pairs, (__m512bh)_mm512_loadu_si512(b));
}
#endif

// One operand A of a product: unit (i, k) is at data[i * row + k * step].
template <typename Unit>
struct Operand {
  const Unit* data;
  int64_t row, step;
};

// Where the sums start: at data[i * row + j], so row = 0 gives every row the same start; null stands for zeros.
struct Start {
  const float* data;
  int64_t row;
};

// C[kRows, panels * kPanel] = start + A B. Panel p of B starts at b + p * b_panel; its row k is at k * b_step from there.
template <typename UnitType>
struct FmaEngine {
  using Unit = UnitType;
  static constexpr int kRows = kTileRows;
  struct Session {};   // what a thread holds while it multiplies

  static PDS_INLINE void product(int64_t depth, int64_t panels, Operand<Unit> a, const Unit* b, int64_t b_panel,
                                 int64_t b_step, Start start, float* c, int64_t c_row) {
    for (int64_t p = 0; p < panels; ++p) {
      vfloat tile[kRows][2];
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < 2; ++j)
          tile[i][j] = start.data == nullptr ? vfloat{} : load(start.data + i * start.row + p * kPanel + j * kWidth);
      }
      accumulate(depth, a, b + p * b_panel, b_step, tile);
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < 2; ++j) store(c + i * c_row + p * kPanel + j * kWidth, tile[i][j]);
    }
  }

  static PDS_INLINE void accumulate(int64_t depth, Operand<Unit> a, const Unit* b, int64_t b_step,
                                    vfloat (&tile)[kRows][2]) {
    const Unit* from = a.data;
    for (int64_t k = 0; k < depth; ++k, from += a.step, b += b_step) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        tile[i][0] = multiply_add(tile[i][0], from[i * a.row], b);
        tile[i][1] = multiply_add(tile[i][1], from[i * a.row], b + kWidth);
      }
    }
  }
};

#if defined(__AVX512BF16__) && defined(__linux__) && defined(__x86_64__)
#define PDS_AMX 1
// The compilers' tile intrinsics do not say that they touch memory, hence the assembler. Tiles have 16 rows of 64 bytes.
#define PDS_TILE_LOAD(tile, from, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(static_cast<int64_t>(bytes)) : "memory")
#define PDS_TILE_STORE(tile, to, bytes) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(bytes)) : "memory")
#define PDS_TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #c)

// Tiles 4 and 5 = 32 rows of 16 units, `row` units apart.
PDS_INLINE void load_left(const Bf16Pair* from, int64_t row) {
  PDS_TILE_LOAD(4, from, row * 4);
  PDS_TILE_LOAD(5, from + 16 * row, row * 4);
}

// Tiles 6 and 7 = 16 rows of 32 units.
PDS_INLINE void load_right(const Bf16Pair* from, int64_t row) {
  PDS_TILE_LOAD(6, from, row * 4);
  PDS_TILE_LOAD(7, from + 16, row * 4);
}

// The same of what the first-level cache need not keep.
PDS_INLINE void stream_right(const Bf16Pair* from, int64_t row) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm6" ::"r"(from), "r"(row * 4) : "memory");
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm7" ::"r"(from + 16), "r"(row * 4) : "memory");
}

// Tiles 0 and 1 (rows 0 to 15), 2 and 3 (the others) += tiles 4 and 5 times tiles 6 and 7.
PDS_INLINE void multiply_tiles() {
  PDS_TILE_MULTIPLY(0, 4, 6);
  PDS_TILE_MULTIPLY(1, 4, 7);
  PDS_TILE_MULTIPLY(2, 5, 6);
  PDS_TILE_MULTIPLY(3, 5, 7);
}

// Tiles 0 and 1 += tile 4 times 16 rows of one panel, tiles 2 and 3 += tile 4 times those of another: four sums at a time,
// since a product has to wait for the last one of its sum.
PDS_INLINE void multiply_short(const Bf16Pair* panel, const Bf16Pair* other) {
  load_right(panel, kPanel);
  PDS_TILE_MULTIPLY(0, 4, 6);
  PDS_TILE_MULTIPLY(1, 4, 7);
  load_right(other, kPanel);
  PDS_TILE_MULTIPLY(2, 4, 6);
  PDS_TILE_MULTIPLY(3, 4, 7);
}

PDS_INLINE void store_tiles(float* to, int64_t row) {   // 32 rows of sums
  PDS_TILE_STORE(0, to, row * 4);
  PDS_TILE_STORE(1, to + 16, row * 4);
  PDS_TILE_STORE(2, to + 16 * row, row * 4);
  PDS_TILE_STORE(3, to + 16 * row + 16, row * 4);
}

PDS_INLINE void load_tiles(const float* from, int64_t row) {
  PDS_TILE_LOAD(0, from, row * 4);
  PDS_TILE_LOAD(1, from + 16, row * 4);
  PDS_TILE_LOAD(2, from + 16 * row, row * 4);
  PDS_TILE_LOAD(3, from + 16 * row + 16, row * 4);
}

PDS_INLINE void clear_tiles() {
  asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
}

// The same with AMX: four tiles of C, 32 x 32. A's step must be 1, and depth a multiple of 16 units.
struct AmxEngine {
  using Unit = Bf16Pair;
  static constexpr int kRows = 32;
  static_assert(kPanel == 32, "two tiles side by side");

  struct Session {
    // The left side and the sums may have fewer rows than 16, which are multiplied in less time.
    explicit Session(int64_t rows = 16) {
      alignas(64) uint8_t config[64] = {1};   // palette 1
      for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = tile < 6 ? static_cast<uint8_t>(rows) : 16;
      }
      asm volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
    }
    ~Session() { asm volatile("tilerelease"); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  static PDS_INLINE void product(int64_t depth, int64_t panels, Operand<Unit> a, const Unit* b, int64_t b_panel,
                                 int64_t b_step, Start start, float* c, int64_t c_row) {
    for (int64_t p = 0; p < panels; ++p) {
      begin(start.data == nullptr ? Start{nullptr, 0} : Start{start.data + p * kPanel, start.row});
      const Unit* from = b + p * b_panel;
      for (int64_t k = 0; k < depth; k += 16) {
        load_left(a.data + k, a.row);
        load_right(from + k * b_step, b_step);
        multiply_tiles();
      }
      store_tiles(c + p * kPanel, c_row);
    }
  }

  static PDS_INLINE void begin(Start start) {
    if (start.data == nullptr) clear_tiles();
    else load_tiles(start.data, start.row);
  }
};
#endif

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
