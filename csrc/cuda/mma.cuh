// Tensor-core products of 16-bit tiles in shared memory: asynchronous copies, ldmatrix and mma.sync (sm_80 and later).
//
// A tile has rows of 16-byte units at a pitch of an odd number of units, so that the eight rows which ldmatrix reads at
// once lie in different banks; no swizzle is needed. Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments"), lane l:
//   accumulator c[16][8]: c0, c1 at row l / 4, columns 2 (l % 4) and + 1; c2, c3 the same in row l / 4 + 8;
//   a[16][16] as four 8 x 8 matrices: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15;
//   b[16][8] as two: rows (k) 0-7 and 8-15.
// An accumulator rounded to 16 bits is therefore an a-fragment of the next product as it lies.
#pragma once
#include "cuda/device.cuh"

#ifdef PDS_CUDA_EMULATION
#include "cuda/emulation/mma.h"
#else

namespace pds {
namespace cuda {

using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async(SharedAddress target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}
// 4 bytes.
__device__ __forceinline__ void copy_word_async(SharedAddress target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kGroups` of this thread's committed groups are under way.
template <int kGroups>
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory"); }

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(SharedAddress row, uint32_t m[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(SharedAddress row, uint32_t m[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row) : "memory");
}

template <typename T>
struct Mma;

template <>
struct Mma<__nv_bfloat16> {
  // c += a b
  static __device__ __forceinline__ void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  // Two elements in a word, `first` in the low half.
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
  }
};

template <>
struct Mma<__half> {
  static __device__ __forceinline__ void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
};

}  // namespace cuda
}  // namespace pds
#endif

namespace pds {
namespace cuda {

// A tile of rows of D 16-bit elements.
template <int D>
struct Tile {
  static constexpr int kUnits = D / 8;
  static constexpr int kPitch = (kUnits | 1) * 16;   // bytes
  static constexpr int bytes(int rows) { return rows * kPitch; }

  static __device__ __forceinline__ int offset(int row, int unit) { return row * kPitch + unit * 16; }

  // The a-fragment of rows first .. first + 15, columns 16 k .. 16 k + 15.
  static __device__ __forceinline__ void load_a(SharedAddress tile, int first, int k, int lane, uint32_t a[4]) {
    load_matrices(tile + offset(first + (lane & 15), 2 * k + (lane >> 4)), a);
  }
  // The a-fragment of the tile's transpose: rows are the columns first .. first + 15, columns the rows 16 k .. 16 k + 15.
  static __device__ __forceinline__ void load_a_transposed(SharedAddress tile, int first, int k, int lane, uint32_t a[4]) {
    load_matrices_transposed(tile + offset(16 * k + (lane & 7) + ((lane >> 4) << 3), first / 8 + ((lane >> 3) & 1)), a);
  }
  // The b-fragments (two words each) of the tile's transpose: columns n are the rows first .. first + 15, k as above.
  static __device__ __forceinline__ void load_b(SharedAddress tile, int first, int k, int lane, uint32_t b[4]) {
    load_matrices(tile + offset(first + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)), b);
  }
  // The b-fragments of the tile itself: k are the rows first .. first + 15, n the columns 8 unit .. 8 unit + 15.
  static __device__ __forceinline__ void load_b_rows(SharedAddress tile, int first, int unit, int lane, uint32_t b[4]) {
    load_matrices_transposed(tile + offset(first + (lane & 15), unit + (lane >> 4)), b);
  }
};

}  // namespace cuda
}  // namespace pds
