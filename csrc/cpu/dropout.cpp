// Dropout, alone or fused with the residual sum. The mask is recomputed from the seed wherever it is needed.
#include "common/dropout.h"

#include <algorithm>

#include "common/philox.h"
#include "cpu/parallel.h"
#include "cpu/philox_simd.h"

namespace pds {
namespace PDS_ISA {
namespace {

constexpr int kStep = kDropoutElementsPerBlock * kBlocks;   // elements per call of draw(): eight vectors
constexpr int64_t kGrainElements = 16384;

// The decision for kStep elements, vector by vector.
#if PDS_WIDTH == 16

struct Kept {
  __mmask32 mask[4];
  PDS_INLINE vfloat operator()(int vector, vfloat x) const {
    return (vfloat)_mm512_maskz_mov_ps(static_cast<__mmask16>(mask[vector / 2] >> (vector % 2 * 16)), (__m512)x);
  }
};
PDS_INLINE __mmask32 at_least(Words pieces, uint32_t threshold) {
  return _mm512_cmpge_epu16_mask(pieces, _mm512_set1_epi16(static_cast<int16_t>(threshold)));
}

#elif PDS_WIDTH == 8

struct Kept {
  __m256i mask[4];
  PDS_INLINE vfloat operator()(int vector, vfloat x) const {
    const __m256i both = mask[vector / 2];
    const __m128i half = vector % 2 ? _mm256_extracti128_si256(both, 1) : _mm256_castsi256_si128(both);
    return (vfloat)_mm256_and_si256((__m256i)x, _mm256_cvtepi16_epi32(half));
  }
};
PDS_INLINE __m256i at_least(Words pieces, uint32_t threshold) {
  const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  return _mm256_cmpeq_epi16(_mm256_max_epu16(pieces, limit), pieces);
}

#endif

#if PDS_WIDTH >= 8

// `block` is a multiple of kBlocks, so that its low word does not wrap inside a call. Blocks sit in 64-bit
// lanes in paired order, so that unpacking the two halves of each block leaves whole blocks, 16 bytes each, in memory order.
PDS_INLINE Kept draw(Philox& philox, uint64_t block, uint32_t threshold) {
  philox.counter2 = static_cast<uint32_t>(block >> 32);
  const uint32_t first = static_cast<uint32_t>(block);
  const Words start[2] = {add_words(splat_words(first), paired_order()),
                          add_words(splat_words(first + kHalf), paired_order())};
  Words words[4][2];
  philox_rounds(philox, start, words);
  Kept kept;
  for (int h = 0; h < 2; ++h) {
    const Words low = low_words(words[0][h], words[1][h]), high = low_words(words[2][h], words[3][h]);
    kept.mask[2 * h] = at_least(unpack_low(low, high), threshold);
    kept.mask[2 * h + 1] = at_least(unpack_high(low, high), threshold);
  }
  return kept;
}

#else

struct Kept {
  vint mask[8];
  PDS_INLINE vfloat operator()(int vector, vfloat x) const { return as_float(as_int(x) & mask[vector]); }
};

PDS_INLINE Kept draw(Philox& philox, uint64_t block, uint32_t threshold) {
  philox.counter2 = static_cast<uint32_t>(block >> 32);
  Kept kept;
  for (int b = 0; b < kBlocks; ++b) {
    uint32_t words[4];
    philox_block(philox, static_cast<uint32_t>(block) + b, words);
    for (int e = 0; e < kDropoutElementsPerBlock; ++e) {
      const uint32_t piece = (words[e / 2] >> (e % 2 * 16)) & 0xFFFFu;
      kept.mask[2 * b + e / 4][e % 4] = piece >= threshold ? -1 : 0;
    }
  }
  return kept;
}

#endif

// Rounds to nearest even as simd.h's store does, but without its test for NaN: sums and multiples of bfloat16 NaNs have
// zeros in their low half, so that rounding cannot carry them over into another number.
PDS_INLINE void store_rounded(float* p, vfloat x) { store(p, x); }
PDS_INLINE void store_rounded(uint16_t* p, vfloat x) {
  const vuint bits = reinterpret_cast<vuint>(x);
  const vuint rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  *reinterpret_cast<vbf16_unaligned*>(p) = __builtin_convertvector(rounded, vbf16);
}

template <bool kResidual, typename T>
PDS_INLINE void drop_step(const Kept& kept, vfloat scale, const T* x, const T* residual, T* out) {
  for (int vector = 0; vector < 8; ++vector) {
    const int at = vector * kWidth;
    vfloat value = kept(vector, load(x + at) * scale);
    if (kResidual) value = load(residual + at) + value;
    store_rounded(out + at, value);
  }
}

template <bool kResidual, typename T>
void drop_range(const DropoutArgs& args, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* out = static_cast<T*>(args.out);
  const vfloat scale = splat(args.scale);
  Philox philox(args.seed);
  philox.counter1 = stream_word(NoiseStream::dropout, 0);
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    const Kept kept = draw(philox, static_cast<uint64_t>(i) / kDropoutElementsPerBlock, args.threshold);
    drop_step<kResidual>(kept, scale, x + i, kResidual ? residual + i : nullptr, out + i);
  }
  if (i == end) return;
  T padded_x[kStep] = {}, padded_residual[kStep] = {}, padded_out[kStep];
  std::copy(x + i, x + end, padded_x);
  if (kResidual) std::copy(residual + i, residual + end, padded_residual);
  const Kept kept = draw(philox, static_cast<uint64_t>(i) / kDropoutElementsPerBlock, args.threshold);
  drop_step<kResidual>(kept, scale, padded_x, padded_residual, padded_out);
  std::copy(padded_out, padded_out + (end - i), out + i);
}

template <typename T>
void dropout_all(const DropoutArgs& args) {
  const int64_t steps = (args.n + kStep - 1) / kStep;
  parallel_ranges(steps, kGrainElements / kStep, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kStep, end = std::min(last * kStep, args.n);
    if (args.residual != nullptr) {
      drop_range<true, T>(args, begin, end);
    } else {
      drop_range<false, T>(args, begin, end);
    }
  });
}

}  // namespace

void dropout(const DropoutArgs& args) {
  if (args.threshold >= kDropoutAll) {   // not a 16-bit number, and scale is infinite
    const size_t bytes = static_cast<size_t>(args.n) * (args.bf16 ? 2 : 4);
    if (args.residual != nullptr) {
      std::memcpy(args.out, args.residual, bytes);
    } else {
      std::memset(args.out, 0, bytes);
    }
    return;
  }
  args.bf16 ? dropout_all<uint16_t>(args) : dropout_all<float>(args);
}

}  // namespace PDS_ISA
}  // namespace pds
