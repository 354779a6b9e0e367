// Counter-based normal noise, the same bits on every instruction set and device.
//
// Philox 4x32-10 (Salmon et al., SC 2011) followed by Box-Muller, written with integer operations and the IEEE-exact
// operations fma, mul, add and sqrt only. A compiler may not contract or reorder them: host files that include this
// header and want the contract are compiled with -ffp-contract=off.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PDS_HD __host__ __device__ __forceinline__
#else
#include <cmath>
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

PDS_HD void philox10(uint32_t c[4], uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c[2];
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(p1);
    c[3] = static_cast<uint32_t>(p0);
    c[0] = n0;
    c[2] = n2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

}  // namespace pds
