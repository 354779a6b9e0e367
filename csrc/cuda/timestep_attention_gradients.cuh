// What the backward kernels of timestep attention share. With P the probabilities (made again from the scores and the
// saved log-sum-exp), R the dropout factors, dO the given gradient, dP = R (dO V^T), delta_i = dO_i . O_i = sum_j P_ij dP_ij
// and dS = scale P (dP - delta): dQ = dS (K + tau), dV = (R P)^T dO, dK' = dS^T Q, c_j = sum_i dS_ij, dk = dK' + c u,
// dtau = dK' + c w, du = sum_j c_j k_j, dw = sum_j c_j tau_j.
//
// Here a warp owns 16 keys and its scores lie transposed, [key][query], so that P and dS go from accumulators to fragments
// without shared memory.
#pragma once
#include "cuda/timestep_attention.cuh"

namespace pds {
namespace cuda {

constexpr float kInfinity = INFINITY;

// scores = (k + tau) q^T and grad_p = v dO^T for the warp's keys and kQueries queries.
template <typename T, int D, int kQueries>
__device__ __forceinline__ void multiply_scores(float scores[][4], float grad_p[][4], const KeyTiles<D, kAttentionRows>& keys,
                                                bool tau, SharedAddress q_tile, SharedAddress grad_tile, int warp, int lane) {
  clear<kQueries / 8>(scores);
  clear<kQueries / 8>(grad_p);
#pragma unroll (D > 96 ? 2 : D / 16)   // all of them at once spill
  for (int k = 0; k < D / 16; ++k) {
    uint32_t fragment[4], time[4] = {0, 0, 0, 0};
    Tile<D>::load_a(keys.k, 16 * warp, k, lane, fragment);
    if (tau) Tile<D>::load_a(keys.tau, 16 * warp, k, lane, time);
    multiply_transposed<T, D, kQueries>(scores, fragment, time, tau, q_tile, k, lane);
    Tile<D>::load_a(keys.v, 16 * warp, k, lane, fragment);
    multiply_transposed<T, D, kQueries>(grad_p, fragment, grad_tile, k, lane);
  }
}

template <Form kForm>
__device__ __forceinline__ float survivor_factor(float factor, uint32_t survive, int bit) {
  return !drops(kForm) ? 1.f : (survive >> bit & 1u) != 0 ? factor : 0.f;
}

// Of the n-th accumulators, 8 queries: scores -> P, grad_p -> dP. `terms`: of the thread's two keys; `lse`: of the queries,
// natural; `scale` in units of log 2.
template <Form kForm>
__device__ __forceinline__ void probabilities(int n, float scores[4], float grad_p[4], const float terms[2], const float* lse,
                                              float scale, float factor, uint32_t survive, int lane) {
  const float2 lses = *reinterpret_cast<const float2*>(lse + 8 * n + 2 * (lane & 3));
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    scores[e] = fast_exp2(scores[e] * scale + terms[e >> 1] - kLog2E * ((e & 1) != 0 ? lses.y : lses.x));
    grad_p[e] *= survivor_factor<kForm>(factor, survive, 4 * n + e);
  }
}

// Then P -> R P, dP -> dS; adds dS to the sums of the thread's two keys.
template <Form kForm>
__device__ __forceinline__ void score_gradients(int n, float p[4], float grad_p[4], const float* deltas, float scale,
                                                float factor, uint32_t survive, float sums[2], int lane) {
  const float2 delta = *reinterpret_cast<const float2*>(deltas + 8 * n + 2 * (lane & 3));
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    grad_p[e] = scale * p[e] * (grad_p[e] - ((e & 1) != 0 ? delta.y : delta.x));
    sums[e >> 1] += grad_p[e];
    p[e] *= survivor_factor<kForm>(factor, survive, 4 * n + e);
  }
}

// grad_u and grad_w parts of this block: sums over its keys in order, a feature per thread.
template <typename T, int D>
__device__ __forceinline__ void store_bias_grads(const TimestepAttentionArgs& a, const Head& head,
                                                 const unsigned char* keys, const float* sums) {
  const int d = threadIdx.x;
  if (d >= a.dim) return;
  const int64_t tiles = attention_tiles(a.keys), out = ((head.b * a.heads + head.h) * tiles + head.tile) * a.dim + d;
  for (int which = 0; which < 2; ++which) {
    float* to = which == 0 ? a.grad_u : a.grad_w;
    if (to == nullptr) continue;
    const unsigned char* tile = keys + which * Tile<D>::bytes(kAttentionRows);
    float total = 0.f;
    for (int r = 0; r < kAttentionRows; ++r)
      total += sums[r] * widen(*reinterpret_cast<const T*>(tile + Tile<D>::offset(r, d / 8) + d % 8 * 2));
    to[out] = total;
  }
}

// out = c + sum of the row times bias (u or w) of the columns.
template <int D>
__device__ __forceinline__ void add_bias(const float grads[][4], const float sums[2], const float* bias, int lane,
                                         float out[][4]) {
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) out[i][e] = grads[i][e] + sums[e >> 1] * bias[8 * i + 2 * (lane & 3) + (e & 1)];
}

// Gradients of tau as float, for a table.
template <int D>
__device__ __forceinline__ void store_float_rows(const TimestepAttentionArgs& a, const Head& head, const float c[][4],
                                                 int first, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + 8 * half;
    if (row >= head.keys) continue;
    float* out = a.grad_tau_rows + ((head.first_key + row) * a.heads + head.h) * a.dim;
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      if (8 * i < a.dim)
        *reinterpret_cast<float2*>(out + 8 * i + 2 * (lane & 3)) = make_float2(c[i][2 * half], c[i][2 * half + 1]);
  }
}

// put_rows of rows that were rotated: the gradients of the rows as they were go to the tile, and `c` becomes, pair by pair,
// the gradient of their cosines and sines.
template <typename T, int D>
__device__ __forceinline__ void put_unrotated(unsigned char* tile, float c[][4], const Rows<T>& rows,
                                              const TimestepAttentionArgs& a, const Head& head, int first) {
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncwarp();   // keeps the loads of one half behind the other's: registers
    const int r = own + lane / 4 + 8 * half, row = first + r;
    const T* turn = rotation_of<T>(a, head, row);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(rows[row]) + (lane & 3);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      if (turn == nullptr || 8 * i >= a.dim) continue;
      const int pair = 4 * i + (lane & 3);
      const float2 x = Mma<T>::unpack(words[4 * i]);
      const float cosine = widen(turn[pair]), sine = widen(turn[a.dim / 2 + pair]);
      const float c0 = c[i][2 * half], c1 = c[i][2 * half + 1];
      reinterpret_cast<uint32_t*>(tile + Tile<D>::offset(r, i))[lane & 3] =
          Mma<T>::pack(c0 * cosine + c1 * sine, c1 * cosine - c0 * sine);
      c[i][2 * half] = c0 * x.x + c1 * x.y;
      c[i][2 * half + 1] = c1 * x.x - c0 * x.y;
    }
  }
}

// Gradients of a warp's rotations, as put_unrotated leaves them, and a.grad_tau_rows: stored there, or what is there added.
template <int D, bool kStore>
__device__ __forceinline__ void share_rotation_grads(const TimestepAttentionArgs& a, const Head& head, float c[][4], int first,
                                                     int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncwarp();
    const int row = first + lane / 4 + 8 * half;
    float* at = a.grad_tau_rows + ((head.first_key + row) * a.heads + head.h) * a.dim + (lane & 3);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      if (row >= head.keys || 8 * i >= a.dim) continue;
      float &cosine = at[4 * i], &sine = at[a.dim / 2 + 4 * i];
      if (kStore) {
        cosine = c[i][2 * half], sine = c[i][2 * half + 1];
      } else {
        c[i][2 * half] += cosine, c[i][2 * half + 1] += sine;
      }
    }
  }
}

// The sum of a warp's gradients of rotations: for a table as float, else through its own rows of a tile.
template <typename T, int D>
__device__ __forceinline__ void store_rotation_grads(unsigned char* tile, float c[][4], const TimestepAttentionArgs& a,
                                                     const Head& head, int first, int warp, int lane) {
  const int own = 16 * warp;
  if (a.grad_tau == nullptr) return share_rotation_grads<D, true>(a, head, c, first + own, lane);
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = reinterpret_cast<T*>(tile + Tile<D>::offset(own + lane / 4 + 8 * half, 0)) + (lane & 3);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      if (8 * i >= a.dim) continue;
      narrow(c[i][2 * half], row[4 * i]);
      narrow(c[i][2 * half + 1], row[a.dim / 2 + 4 * i]);
    }
  }
  __syncwarp();
  copy_out<T, D>(tile, static_cast<T*>(a.grad_tau) + (head.first_key * a.heads + head.h) * a.dim, a.heads * a.dim, first,
                 head.keys, a.dim);
}

template <int kCount>
__device__ __forceinline__ void copy(float c[kCount][4], const float other[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[i][e] = other[i][e];
}

template <int kCount>
__device__ __forceinline__ void add(float c[kCount][4], const float other[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[i][e] += other[i][e];
}

// c_j of the warp's keys, from its threads' shares, to where all the block finds them.
__device__ __forceinline__ void store_sums(float own[2], float* sums, int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    own[half] = sum_over_quad(own[half]);
    if ((lane & 3) == 0) sums[16 * warp + lane / 4 + 8 * half] = own[half];
  }
}

// The way out of a block's gradients: through tiles of shared memory into tensors [batch, token, head, dim]. Of rotated rows
// the gradients of the rotations are left in `c`.
template <typename T, int D, Form kForm>
struct GradientStore {
  const TimestepAttentionArgs& a;
  const Head& head;
  int first;   // row of the block
  __device__ __forceinline__ void query(unsigned char* tile, float c[][4]) const {
    store(tile, c, query_rows<T>(a, a.q, head), a.grad_q, head.first_query, a.grad_q_token);
  }
  __device__ __forceinline__ void key(unsigned char* tile, float c[][4]) const {
    store(tile, c, key_rows<T>(a, a.k, head), a.grad_k, head.first_key, a.grad_k_token);
  }
  __device__ __forceinline__ void value(unsigned char* tile, float c[][4]) const {
    store(tile, c, key_rows<T>(a, a.v, head), a.grad_v, head.first_key, a.grad_k_token);
  }
  // dk and dtau from dK'.
  __device__ __forceinline__ void key_and_time(unsigned char* tile, const float c[][4], const float sums[2], const float* biases,
                                               int warp, int lane) const {
    float shifted[D / 8][4];
    add_bias<D>(c, sums, biases, lane, shifted);
    key(tile, shifted);
    if (a.grad_tau == nullptr && a.grad_tau_rows == nullptr) return;
    add_bias<D>(c, sums, biases + D, lane, shifted);
    if (a.grad_tau_rows != nullptr) store_float_rows<D>(a, head, shifted, first + 16 * warp, lane);
    else store(tile, shifted, key_rows<T>(a, a.tau, head), a.grad_tau, head.first_key, a.heads * a.dim);
  }

 private:
  __device__ __forceinline__ void store(unsigned char* tile, float c[][4], const Rows<T>& rows, void* to, int64_t first_token,
                                        int64_t stride) const {
    const float ones[2] = {1.f, 1.f};
    T* out = static_cast<T*>(to) + first_token * stride + head.h * a.dim;
    if (kForm != Form::rotary) return store_rows<T, D>(tile, c, ones, out, stride, first, rows.count, a.dim);
    __syncwarp();
    put_unrotated<T, D>(tile, c, rows, a, head, first);
    __syncwarp();
    copy_out<T, D>(tile, out, stride, first, rows.count, a.dim);
  }
};

// Sentences of at most a block's rows have a kernel of their own; of rotated rows of more than 96 features it would spill.
constexpr bool has_short_kernel(Form form, int64_t dim) { return form != Form::rotary || dim <= 96; }
inline bool is_short(const TimestepAttentionArgs& a) {
  const auto fits = [](int64_t rows) { return rows >= 1 && rows <= kAttentionRows; };
  return has_short_kernel(a.rotary ? Form::rotary : Form::plain, a.dim) && fits(a.queries) && fits(a.keys);
}
Status timestep_attention_backward_short(const TimestepAttentionArgs& args, const int64_t* device_seed, const Launch& launch);

}  // namespace cuda
}  // namespace pds
