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

// The gradient of a row from that of the turned row; adds to tau's.
template <typename T>
void write_turned_back(const Sizes& s, const T* tau, const T* row, const float* grad, T* out, float* grad_tau) {
  for (int64_t d = 0; d < s.dim; d += kWidth)
    round_to_memory(out + d, turn_back(tau, s.dim, d, read(row + d, s.dim - d), load(grad + d), grad_tau), s.dim - d);
}

template <typename T>
void write_query_grads(const TimestepAttentionArgs& a, const Sizes& s, int64_t b, int64_t h, int64_t i0, int64_t n,
                       const float* rows, float* grad_turns) {
  T* out = static_cast<T*>(a.grad_q) + (b * a.queries + i0) * a.grad_q_token + h * a.dim;
  for (int64_t i = 0; i < n; ++i, out += a.grad_q_token) {
    if (a.rotary && rows) {
      write_turned_back(s, tau_row<T>(a, b, i0 + i, h), row_of<T>(a.q, b, i0 + i, h), rows + i * s.padded, out,
                        grad_turns + (i0 + i) * s.padded);
      continue;
    }
    for (int64_t d = 0; d < s.dim; d += kWidth)
      round_to_memory(out + d, rows ? load(rows + i * s.padded + d) : vfloat{}, s.dim - d);
  }
}

// Writes dk, dv and dtau of key j from the head's sums (row `at`, or zeros where the mask removed the key).
template <typename T>
void write_key_grads(const TimestepAttentionArgs& a, const Sizes& s, const HeadSums& sums, int64_t b, int64_t j, int64_t h,
                     int64_t at, float sum) {
  const int64_t out = ((b * a.keys + j) * a.heads + h) * a.dim, out_kv = (b * a.keys + j) * a.grad_k_token + h * a.dim;
  const T *u = head_row<T>(a.u, h, a.dim), *w = head_row<T>(a.w, h, a.dim);
  for (int64_t d = 0; d < s.dim; d += kWidth) {
    const int64_t left = s.dim - d;
    const vfloat key = at < 0 ? vfloat{} : load(sums.key + at * s.padded + d);
    const vfloat value = at < 0 ? vfloat{} : load(sums.value + at * s.padded + d);
    round_to_memory(static_cast<T*>(a.grad_v) + out_kv + d, value, left);
    round_to_memory(static_cast<T*>(a.grad_k) + out_kv + d, u ? key + splat(sum) * read(u + d, left) : key, left);
    if (!a.grad_tau && !a.grad_tau_rows) continue;
    const vfloat time = w ? key + splat(sum) * read(w + d, left) : key;
    if (a.grad_tau_rows) round_to_memory(a.grad_tau_rows + out + d, time, left);
    else round_to_memory(static_cast<T*>(a.grad_tau) + out + d, time, left);
  }
}

// The same in the rotary form.
template <typename T>
void write_turned_key_grads(const TimestepAttentionArgs& a, const Sizes& s, const HeadSums& sums, int64_t b, int64_t j,
                            int64_t h, int64_t at) {
  const int64_t out = ((b * a.keys + j) * a.heads + h) * a.dim, out_kv = (b * a.keys + j) * a.grad_k_token + h * a.dim;
  T *grad_k = static_cast<T*>(a.grad_k) + out_kv, *grad_v = static_cast<T*>(a.grad_v) + out_kv;
  float* grad_tau = sums.turns + j * s.padded;
  if (at < 0) {
    std::fill_n(grad_k, s.dim, T{});
    std::fill_n(grad_v, s.dim, T{});
  } else {
    const T* tau = tau_row<T>(a, b, j, h);
    write_turned_back(s, tau, row_of<T>(a.k, b, j, h), sums.key + at * s.padded, grad_k, grad_tau);
    write_turned_back(s, tau, row_of<T>(a.v, b, j, h), sums.value + at * s.padded, grad_v, grad_tau);
  }
  for (int64_t d = 0; d < s.dim; d += kWidth) {
    if (a.grad_tau_rows) round_to_memory(a.grad_tau_rows + out + d, load(grad_tau + d), s.dim - d);
    else round_to_memory(static_cast<T*>(a.grad_tau) + out + d, load(grad_tau + d), s.dim - d);
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
