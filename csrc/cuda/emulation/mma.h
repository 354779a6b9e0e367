// The warp operations of cuda/mma.cuh as plain functions over the fragments of 32 lanes (PTX ISA, "Matrix Fragments").
#pragma once
#include "cuda/emulation/emulation.h"

namespace pds {
namespace cuda {

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* p) { return reinterpret_cast<SharedAddress>(p); }

using emulation::commit_copies;
inline void copy_async(SharedAddress target, const void* source, bool valid) {
  emulation::copy_async(target, source, 16, valid);
}
inline void copy_word_async(SharedAddress target, const void* source) { emulation::copy_async(target, source, 4, true); }
template <int kGroups>
void wait_copies() { emulation::wait_copies(kGroups); }

struct MatrixLoad {
  SharedAddress row;
  uint32_t* m;
};

// Lane l receives elements 2 (l % 4) and + 1 of row l / 4 of each matrix, or of column l / 4 where transposed.
template <bool kTransposed>
void load_matrices_of_warp(SharedAddress row, uint32_t m[4]) {
  emulation::check_shared(row, 16, "ldmatrix");
  MatrixLoad load{row, m};
  emulation::meet_warp(kTransposed ? "ldmatrix.trans" : "ldmatrix", &load, [](void** lanes) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r)
        std::memcpy(matrix[r], reinterpret_cast<void*>(static_cast<MatrixLoad*>(lanes[8 * i + r])->row), 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = 2 * (lane % 4);
        const uint32_t low = kTransposed ? matrix[c][r] : matrix[r][c];
        const uint32_t high = kTransposed ? matrix[c + 1][r] : matrix[r][c + 1];
        static_cast<MatrixLoad*>(lanes[lane])->m[i] = low | high << 16;
      }
    }
  });
}

inline void load_matrices(SharedAddress row, uint32_t m[4]) { load_matrices_of_warp<false>(row, m); }
inline void load_matrices_transposed(SharedAddress row, uint32_t m[4]) { load_matrices_of_warp<true>(row, m); }

struct Fragments {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
struct Mma {
  static uint32_t pack(float first, float second) {
    T low, high;
    narrow(first, low);
    narrow(second, high);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
  }
  static float2 unpack(uint32_t word) {
    return {widen(T{static_cast<uint16_t>(word)}), widen(T{static_cast<uint16_t>(word >> 16)})};
  }

  static void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    Fragments fragments{c, a, {b0, b1}};
    emulation::meet_warp("mma.sync", &fragments, &multiply_warp);
  }

 private:
  static void multiply_warp(void** lanes) {
    float a[16][16], b[8][16];   // b by column
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments& f = *static_cast<Fragments*>(lanes[lane]);
      const int r = lane / 4, c = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack(f.a[i]);
        a[r + 8 * (i % 2)][c + 8 * (i / 2)] = x.x;
        a[r + 8 * (i % 2)][c + 8 * (i / 2) + 1] = x.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 x = unpack(f.b[i]);
        b[r][c + 8 * i] = x.x;
        b[r][c + 8 * i + 1] = x.y;
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* out = static_cast<Fragments*>(lanes[lane])->c;
      for (int i = 0; i < 4; ++i) {
        const float *row = a[lane / 4 + 8 * (i / 2)], *column = b[2 * (lane % 4) + i % 2];
        float sum = out[i];
        for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
        out[i] = sum;
      }
    }
  }
};

}  // namespace cuda
}  // namespace pds
