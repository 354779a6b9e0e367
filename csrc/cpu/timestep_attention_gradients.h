// The last part of timestep attention's backward: from the sums of a head, which lie as float rows, to the gradients as the
// caller keeps them. The formulas are in timestep_attention_backward.cpp.
#pragma once
#include "cpu/gemm.h"
#include "cpu/timestep_attention.h"

namespace pds {
namespace PDS_ISA {

// What the queries of a head add up.
struct HeadSums {
  float *key, *value;   // [keys][padded]: dK' and dV
  float* scores;        // [keys][kWidth]: of the scores' gradients, spread over the lanes
  float *u, *w;         // [padded]
  float* turns;         // [keys][padded]: tau's gradient in the rotary form

  static int64_t floats(const TimestepAttentionArgs& a, const Sizes& s) {
    return round_up(a.keys, 32) * ((a.rotary ? 3 : 2) * s.padded + kWidth) + 2 * s.padded;
  }
  void take(Scratch& scratch, const TimestepAttentionArgs& a, const Sizes& s) {
    const int64_t keys = round_up(a.keys, 32);
    key = scratch.take(keys * s.padded);
    value = scratch.take(keys * s.padded);
    scores = scratch.take(keys * kWidth);
    u = scratch.take(s.padded);
    w = scratch.take(s.padded);
    turns = a.rotary ? scratch.take(keys * s.padded) : nullptr;
  }
  void clear(const TimestepAttentionArgs& a, const Sizes& s, int64_t count) {
    std::fill_n(scores, count * kWidth, 0.f);
    if (a.rotary) std::fill_n(turns, a.keys * s.padded, 0.f);
  }
};

// Gradients that no cache would hold are written past the caches: else each line is read before it is overwritten. Smaller
// ones are still there when the layer before reads them.
constexpr int64_t kStreamedBytes = 32 << 20;

inline bool streams_gradients(const TimestepAttentionArgs& a) {
  const int64_t tokens = a.batch * (a.queries + a.keys * (a.grad_tau ? 3 : 2));
  return PDS_WIDTH == 16 && tokens * a.heads * a.dim * (a.bf16 ? 2 : 4) >= kStreamedBytes;
}

// Where gradients that stay in the caches will be written.
template <typename T>
void fetch_query_gradients(Prefetch& ahead, const TimestepAttentionArgs& a, int64_t b, int64_t h, int64_t i0, int64_t n) {
  fetch_rows<T>(ahead, tokens_apart(a, a.grad_q, a.queries, a.grad_q_token), b, h, i0, n, a.dim);
}
template <typename T>
void fetch_key_gradients(Prefetch& ahead, const TimestepAttentionArgs& a, int64_t b, int64_t h) {
  for (const void* grad : {a.grad_k, a.grad_v})
    fetch_rows<T>(ahead, tokens_apart(a, grad, a.keys, a.grad_k_token), b, h, 0, a.keys, a.dim);
  fetch_rows<T>(ahead, tokens_apart(a, a.grad_tau, a.keys, a.heads * a.dim), b, h, 0, a.keys, a.dim);
}

#if PDS_WIDTH == 16
PDS_INLINE bool is_aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
PDS_INLINE bool stream(float* p, vfloat x) {
  if (!is_aligned(p, 64)) return false;
  _mm512_stream_ps(p, (__m512)x);
  return true;
}
PDS_INLINE bool stream(uint16_t* p, vfloat x) {
#if defined(__AVX512BF16__)
  if (!is_aligned(p, 32)) return false;
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  return true;
#else
  (void)p, (void)x;
  return false;
#endif
}
#endif

// Up to kWidth elements of a gradient, rounded.
template <typename T>
PDS_INLINE void write_gradient([[maybe_unused]] bool streamed, T* p, vfloat x, int64_t left) {
#if PDS_WIDTH == 16
  if (streamed && left >= kWidth && stream(p, x)) return;
#endif
  round_to_memory(p, x, left);
}

// Streamed lines are seen by other threads only after this.
inline void finish_streams() {
#if PDS_WIDTH == 16
  _mm_sfence();
#endif
}

// The gradient of a row from that of the turned row; adds to tau's.
template <typename T>
void write_turned_back(const Sizes& s, bool streamed, const T* tau, const T* row, const float* grad, T* out,
                       float* grad_tau) {
  for (int64_t d = 0; d < s.dim; d += kWidth)
    write_gradient(streamed, out + d, turn_back(tau, s.dim, d, read(row + d, s.dim - d), load(grad + d), grad_tau), s.dim - d);
}

template <typename T>
void write_query_grads(const TimestepAttentionArgs& a, const Sizes& s, int64_t b, int64_t h, int64_t i0, int64_t n,
                       const float* rows, float* grad_turns) {
  const bool streamed = streams_gradients(a);
  T* out = static_cast<T*>(a.grad_q) + (b * a.queries + i0) * a.grad_q_token + h * a.dim;
  for (int64_t i = 0; i < n; ++i, out += a.grad_q_token) {
    if (a.rotary && rows) {
      write_turned_back(s, streamed, tau_row<T>(a, b, i0 + i, h), row_of<T>(a.q, b, i0 + i, h), rows + i * s.padded, out,
                        grad_turns + (i0 + i) * s.padded);
      continue;
    }
    for (int64_t d = 0; d < s.dim; d += kWidth)
      write_gradient(streamed, out + d, rows ? load(rows + i * s.padded + d) : vfloat{}, s.dim - d);
  }
}

// Writes dk, dv and dtau of key j from the head's sums (row `at`, or zeros where the mask removed the key).
template <typename T>
void write_key_grads(const TimestepAttentionArgs& a, const Sizes& s, const HeadSums& sums, int64_t b, int64_t j, int64_t h,
                     int64_t at, float sum) {
  const int64_t out = ((b * a.keys + j) * a.heads + h) * a.dim, out_kv = (b * a.keys + j) * a.grad_k_token + h * a.dim;
  const T *u = head_row<T>(a.u, h, a.dim), *w = head_row<T>(a.w, h, a.dim);
  const bool streamed = streams_gradients(a);
  for (int64_t d = 0; d < s.dim; d += kWidth) {
    const int64_t left = s.dim - d;
    const vfloat key = at < 0 ? vfloat{} : load(sums.key + at * s.padded + d);
    const vfloat value = at < 0 ? vfloat{} : load(sums.value + at * s.padded + d);
    write_gradient(streamed, static_cast<T*>(a.grad_v) + out_kv + d, value, left);
    write_gradient(streamed, static_cast<T*>(a.grad_k) + out_kv + d, u ? key + splat(sum) * read(u + d, left) : key, left);
    if (!a.grad_tau && !a.grad_tau_rows) continue;
    const vfloat time = w ? key + splat(sum) * read(w + d, left) : key;
    if (a.grad_tau_rows) round_to_memory(a.grad_tau_rows + out + d, time, left);
    else write_gradient(streamed, static_cast<T*>(a.grad_tau) + out + d, time, left);
  }
}

// The same in the rotary form.
template <typename T>
void write_turned_key_grads(const TimestepAttentionArgs& a, const Sizes& s, const HeadSums& sums, int64_t b, int64_t j,
                            int64_t h, int64_t at) {
  const int64_t out = ((b * a.keys + j) * a.heads + h) * a.dim, out_kv = (b * a.keys + j) * a.grad_k_token + h * a.dim;
  T *grad_k = static_cast<T*>(a.grad_k) + out_kv, *grad_v = static_cast<T*>(a.grad_v) + out_kv;
  float* grad_tau = sums.turns + j * s.padded;
  const bool streamed = streams_gradients(a);
  if (at < 0) {
    std::fill_n(grad_k, s.dim, T{});
    std::fill_n(grad_v, s.dim, T{});
  } else {
    const T* tau = tau_row<T>(a, b, j, h);
    write_turned_back(s, streamed, tau, row_of<T>(a.k, b, j, h), sums.key + at * s.padded, grad_k, grad_tau);
    write_turned_back(s, streamed, tau, row_of<T>(a.v, b, j, h), sums.value + at * s.padded, grad_v, grad_tau);
  }
  for (int64_t d = 0; d < s.dim; d += kWidth) {
    if (a.grad_tau_rows) round_to_memory(a.grad_tau_rows + out + d, load(grad_tau + d), s.dim - d);
    else write_gradient(streamed, static_cast<T*>(a.grad_tau) + out + d, load(grad_tau + d), s.dim - d);
  }
}

template <typename T>
void add_scaled_row(const Sizes& s, float factor, const T* row, float* sum) {
  for (int64_t d = 0; d < s.dim; d += kWidth) store(sum + d, load(sum + d) + splat(factor) * read(row + d, s.dim - d));
}

template <typename T, typename AnyKeys>
void finish_head(const TimestepAttentionArgs& a, const Sizes& s, const AnyKeys& keys, HeadSums& sums, int64_t b, int64_t h) {
  std::fill_n(sums.u, s.padded, 0.f);
  std::fill_n(sums.w, s.padded, 0.f);
  int64_t at = 0;
  for (int64_t j = 0; j < a.keys; ++j) {
    const bool kept = at < keys.count && keys.index[at] == j;
    const float sum = kept ? add_lanes(load(sums.scores + at * kWidth)) : 0.f;
    if (a.rotary) write_turned_key_grads<T>(a, s, sums, b, j, h, kept ? at : -1);
    else write_key_grads<T>(a, s, sums, b, j, h, kept ? at : -1, sum);
    if (!kept) continue;
    if (a.grad_u) add_scaled_row(s, sum, row_of<T>(a.k, b, j, h), sums.u);
    if (a.grad_w) add_scaled_row(s, sum, tau_row<T>(a, b, j, h), sums.w);
    ++at;
  }
  const int64_t out = (b * a.heads + h) * a.dim;
  if (a.grad_u) std::copy_n(sums.u, a.dim, a.grad_u + out);
  if (a.grad_w) std::copy_n(sums.w, a.dim, a.grad_w + out);
}

}  // namespace PDS_ISA
}  // namespace pds
