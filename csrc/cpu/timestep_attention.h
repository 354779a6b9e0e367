// What the forward and the backward of timestep attention share.
//
// Scores are kept transposed, [key][query]: the vector lanes run over queries. So the softmax needs no reductions across
// lanes, keys need no padding, keys that the mask removes are left out altogether, and K + tau is used as it lies. The
// per-key term u . k_j + w . tau_j is where the sums of a key's products start from.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "common/philox.h"
#include "common/timestep_attention.h"
#include "cpu/gemm_tile.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/timestep_attention_rotary.h"

#if PDS_X86
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"   // GCC 12 warns about its own AVX-512 headers
#endif

namespace pds {
namespace PDS_ISA {

constexpr int64_t kQueryBlock = 64;   // queries per pass over the keys

// One thread's scratch, grown when a larger problem comes and kept.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void reserve(int64_t floats) {
    used_ = 0;
    if (floats <= size_) return;
    std::free(data_);
    size_ = align_up(floats, 1024);
    data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
    if (data_ == nullptr) std::abort();   // no exception may cross the threads of an OpenMP pool
  }
  float* take(int64_t floats) {
    float* p = data_ + used_;
    used_ += align_up(floats, 16);
    return p;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Up to kWidth elements of a row with `left` elements to go; the rest reads as zero.
template <typename T>
PDS_INLINE vfloat read(const T* p, int64_t left) {
  if (left >= kWidth) return load(p);
  vfloat x{};
  for (int i = 0; i < left; ++i) x[i] = to_float(p[i]);
  return x;
}
template <typename T>
PDS_INLINE void write(T* p, vfloat x, int64_t left) {
  if (left >= kWidth) return store(p, x);
  for (int i = 0; i < left; ++i) from_float(p[i], x[i]);
}

// The same, rounded by the processor where it can: it takes subnormal numbers for zero.
PDS_INLINE void round_to_memory(float* p, vfloat x, int64_t left) { write(p, x, left); }
PDS_INLINE void round_to_memory(uint16_t* p, vfloat x, int64_t left) {
#if defined(__AVX512BF16__)
  const __mmask16 mask = static_cast<__mmask16>(left >= kWidth ? 0xFFFF : (1 << left) - 1);
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  write(p, x, left);
#endif
}

// Sum of the lanes, by halves.
PDS_INLINE float add_lanes(vfloat x) {
#if PDS_WIDTH == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
#endif
}

template <typename T>
const T* row_of(const HeadTensor& t, int64_t b, int64_t token, int64_t h) {
  return static_cast<const T*>(t.data) + b * t.batch + token * t.token + h * t.head;
}

// The tau row of key j (the table's row for its timestep, or the sentence's own).
template <typename T>
const T* tau_row(const TimestepAttentionArgs& a, int64_t b, int64_t j, int64_t h) {
  return a.timesteps ? row_of<T>(a.tau, 0, a.timesteps[b * a.keys + j], h) : row_of<T>(a.tau, b, j, h);
}

// A tensor [batch, tokens, heads, dim], contiguous within a token.
inline HeadTensor tokens_apart(const TimestepAttentionArgs& a, const void* data, int64_t tokens, int64_t apart) {
  return {data, tokens * apart, apart, a.dim};
}

// Rows i0 .. i0+n-1 of one head, to be fetched ahead.
template <typename T>
void fetch_rows(Prefetch& ahead, const HeadTensor& t, int64_t b, int64_t h, int64_t i0, int64_t n, int64_t dim) {
  if (t.data) ahead.add(row_of<T>(t, b, i0, h), t.token * sizeof(T), n, dim * sizeof(T));
}

template <typename T>
void fetch_keys(Prefetch& ahead, const TimestepAttentionArgs& a, int64_t b, int64_t h, int64_t j0, int64_t n) {
  fetch_rows<T>(ahead, a.k, b, h, j0, n, a.dim);
  if (!a.timesteps) fetch_rows<T>(ahead, a.tau, b, h, j0, n, a.dim);
  fetch_rows<T>(ahead, a.v, b, h, j0, n, a.dim);
}

template <typename T>
const T* head_row(const void* table, int64_t h, int64_t dim) {
  return table ? static_cast<const T*>(table) + h * dim : nullptr;
}

struct Sizes {
  int64_t dim, padded;
  bool bias;

  explicit Sizes(const TimestepAttentionArgs& a, int64_t multiple = kWidth)
      : dim(a.dim), padded(align_up(a.dim, multiple)), bias(a.u != nullptr || (a.w != nullptr && a.tau.data != nullptr)) {}
};

// The keys of one head that the mask keeps.
struct Keys {
  int64_t count = 0, gathered = 0;
  int32_t* index;   // [count] position of each; the rest is there for the first `gathered` keys
  float* sum;       // [count][padded]: k + tau, or the turned k
  float* value;     // [count][padded]
  float* bias;      // [count]: the score's per-key term

  static int64_t floats(const TimestepAttentionArgs& a, const Sizes& s) { return a.keys * (2 + 2 * s.padded) + 64; }
  void take(Scratch& scratch, const TimestepAttentionArgs& a, const Sizes& s) {
    index = reinterpret_cast<int32_t*>(scratch.take(a.keys));
    sum = scratch.take(a.keys * s.padded);
    value = scratch.take(a.keys * s.padded);
    bias = scratch.take(a.keys);
  }
};

// Four consecutive elements of each of the rows 0, 4, 8, ... (kWidth / 4 of them).
PDS_INLINE vfloat load_quads(const float* p, int64_t ld) {
#if PDS_WIDTH == 16
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 4 * ld), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 8 * ld), 2);
  return (vfloat)_mm512_insertf32x4(x, _mm_loadu_ps(p + 12 * ld), 3);
#elif PDS_WIDTH == 8
  return (vfloat)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
#else
  (void)ld;
  return load(p);
#endif
}

// [c, d] of each quad from two vectors: lanes (a0 b0 a1 b1) for low, (a2 b2 a3 b3) for high.
PDS_INLINE vfloat interleave(vfloat a, vfloat b, bool high) {
  vint lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = (i & ~3) + (high ? 2 : 0) + (i & 3) / 2 + (i & 1) * kWidth;
  return __builtin_shuffle(a, b, lanes);
}
PDS_INLINE vfloat join_halves(vfloat a, vfloat b, bool high) {   // of each quad: (a0 a1 b0 b1) or (a2 a3 b2 b3)
  vint lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = (i & ~3) + (high ? 2 : 0) + (i & 1) + ((i & 2) ? kWidth : 0);
  return __builtin_shuffle(a, b, lanes);
}

// Four neighbouring columns of kWidth rows: out[c][i] = p[i * ld + c]. Only moves bits, so they need not be floats.
PDS_INLINE void transpose_quad(const float* p, int64_t ld, vfloat (&out)[4]) {
  const vfloat a = load_quads(p, ld), b = load_quads(p + ld, ld);
  const vfloat c = load_quads(p + 2 * ld, ld), e = load_quads(p + 3 * ld, ld);
  const vfloat ab0 = interleave(a, b, false), ab1 = interleave(a, b, true);
  const vfloat ce0 = interleave(c, e, false), ce1 = interleave(c, e, true);
  out[0] = join_halves(ab0, ce0, false), out[1] = join_halves(ab0, ce0, true);
  out[2] = join_halves(ab1, ce1, false), out[3] = join_halves(ab1, ce1, true);
}

// out[i] = the sum (or largest) of the lanes of row i of kWidth rows of kWidth.
template <typename Combine>
PDS_INLINE vfloat fold_rows(const float* rows, Combine combine) {
  vfloat all[kWidth / 4], four[4];
  for (int q = 0; q < kWidth / 4; ++q) {
    transpose_quad(rows + 4 * q, kWidth, four);
    all[q] = combine(combine(four[0], four[1]), combine(four[2], four[3]));
  }
  for (int half = kWidth / 8; half > 0; half /= 2)
    for (int q = 0; q < half; ++q) all[q] = combine(all[q], all[q + half]);
  return all[0];
}
PDS_INLINE vfloat add(vfloat a, vfloat b) { return a + b; }

// Writes k + tau; returns u . k + w . tau, spread over the lanes.
template <typename T>
PDS_INLINE vfloat gather_key(const Sizes& s, const T* k, const T* tau, const T* u, const T* w, float* sum) {
  vfloat dot{};
  for (int64_t d = 0; d < s.padded; d += kWidth) {
    const int64_t left = s.dim - d;
    vfloat key = read(k + d, left);
    if (u) dot += key * read(u + d, left);
    if (tau) {
      const vfloat time = read(tau + d, left);
      if (w) dot += time * read(w + d, left);
      key += time;
    }
    store(sum + d, key);
  }
  return dot;
}

template <typename T>
PDS_INLINE void gather_row(const Sizes& s, const T* row, const T* turned_by, float* out) {
  for (int64_t d = 0; d < s.padded; d += kWidth) {
    const vfloat x = read(row + d, s.dim - d);
    store(out + d, turned_by ? turn(turned_by, s.dim, d, x) : x);
  }
}

template <typename AnyKeys>
void select_keys(const TimestepAttentionArgs& a, int64_t b, AnyKeys& keys) {
  keys.count = keys.gathered = 0;
  for (int64_t j = 0; j < a.keys; ++j)
    if (!a.key_mask || a.key_mask[b * a.keys + j]) keys.index[keys.count++] = static_cast<int32_t>(j);
}

// Gathers the selected keys of a head up to number `end`.
template <typename T>
void gather_keys(const TimestepAttentionArgs& a, const Sizes& s, int64_t b, int64_t h, int64_t end, Keys& keys) {
  const T *u = head_row<T>(a.u, h, a.dim), *w = head_row<T>(a.w, h, a.dim);
  alignas(64) float terms[kWidth * kWidth];
  for (int64_t& at = keys.gathered; at < end;) {
    const int64_t first = at, count = std::min<int64_t>(kWidth, end - first);
    for (; at < first + count; ++at) {
      const int64_t j = keys.index[at];
      const T *k = row_of<T>(a.k, b, j, h), *tau = a.tau.data ? tau_row<T>(a, b, j, h) : nullptr;
      float* sum = keys.sum + at * s.padded;
      if (a.rotary) gather_row(s, k, tau, sum);
      else store(terms + (at - first) * kWidth, gather_key(s, k, tau, u, w, sum));
      gather_row(s, row_of<T>(a.v, b, j, h), a.rotary ? tau : nullptr, keys.value + at * s.padded);
    }
    if (s.bias) write(keys.bias + first, splat(a.scale) * fold_rows(terms, add), count);
  }
}

// Rows i0 .. i0+n-1 of one head as float, [lanes][padded], zero rows from n on; turned where `turned` says so.
template <typename T>
void gather_rows(const TimestepAttentionArgs& a, const Sizes& s, const HeadTensor& t, bool turned, int64_t b, int64_t h,
                 int64_t i0, int64_t n, int64_t lanes, float* rows) {
  for (int64_t i = 0; i < n; ++i)
    gather_row(s, row_of<T>(t, b, i0 + i, h), turned ? tau_row<T>(a, b, i0 + i, h) : nullptr, rows + i * s.padded);
  std::fill_n(rows + n * s.padded, (lanes - n) * s.padded, 0.f);
}

// columns[d][i] = factor * rows[i][d] for `lanes` rows (a multiple of kWidth), `apart` from each other, of `padded` elements.
inline void transpose(const float* rows, int64_t apart, int64_t lanes, int64_t padded, float factor, float* columns) {
  for (int64_t i = 0; i < lanes; i += kWidth)
    for (int64_t d = 0; d < padded; d += 4) {
      vfloat quad[4];
      transpose_quad(rows + i * apart + d, apart, quad);
      for (int c = 0; c < 4; ++c) store(columns + (d + c) * lanes + i, splat(factor) * quad[c]);
    }
}

PDS_INLINE void multiply_wide(vuint a, uint32_t m, vuint& high, vuint& low) {
#if PDS_WIDTH == 16
  const __m512i x = (__m512i)a, factor = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  high = (vuint)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  low = (vuint)_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
#elif PDS_WIDTH == 8
  const __m256i x = (__m256i)a, factor = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  high = (vuint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = (vuint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * m;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Which probabilities of kWidth neighbouring queries survive, key by key (ascending).
class DropoutLanes {
 public:
  DropoutLanes(const TimestepAttentionArgs& a, int64_t head, int64_t query)
      : seed_(a.seed), head_(static_cast<uint32_t>(a.first_head + head)), threshold_(vuint{} + a.drop_threshold) {
    for (int i = 0; i < kWidth; ++i) query_[i] = static_cast<uint32_t>(query + i);
  }
  PDS_INLINE vint keep(int64_t key) {
    if (key / 8 != group_) draw(key / 8);
    const vuint word = words_[(key % 8) / 2];
    const vuint bits = (key & 1) ? word >> 16 : word & 0xFFFFu;
    return bits >= threshold_;
  }
#if PDS_WIDTH == 16
  // The bits of 8 keys (the first is a multiple of 8) and all 16 queries, whose rows are `row` apart.
  void write_bits(int64_t key, int64_t row, uint16_t* to) {
    draw(key / 8);
    alignas(64) uint32_t words[4][kWidth];
    for (int i = 0; i < 4; ++i) std::memcpy(words[i], &words_[i], sizeof(words_[i]));
    for (int q = 0; q < kWidth; ++q)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + q * row),
                       _mm_setr_epi32(static_cast<int>(words[0][q]), static_cast<int>(words[1][q]),
                                      static_cast<int>(words[2][q]), static_cast<int>(words[3][q])));
  }
#endif

 private:
  PDS_INLINE void draw(int64_t group) {
    group_ = group;
    vuint c0 = vuint{} + static_cast<uint32_t>(group), c1 = vuint{} + kAttentionStream, c2 = query_, c3 = vuint{} + head_;
    uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      vuint high0, low0, high1, low1;
      multiply_wide(c0, kPhiloxM0, high0, low0);
      multiply_wide(c2, kPhiloxM1, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c2 = high0 ^ c3 ^ k1;
      c1 = low1;
      c3 = low0;
    }
    words_[0] = c0, words_[1] = c1, words_[2] = c2, words_[3] = c3;
  }

  uint64_t seed_;
  uint32_t head_;
  vuint threshold_, query_{}, words_[4];
  int64_t group_ = -1;
};

// 1 / (probability that an element survives).
inline float survivor_factor(const TimestepAttentionArgs& a) { return 1.f / (1.f - a.drop_threshold * kDropUnit); }

}  // namespace PDS_ISA
}  // namespace pds
