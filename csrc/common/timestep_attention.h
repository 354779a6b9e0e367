// Arguments of attention with a timestep per token (spec "txl" form of AR-Diffusion):
//   score_ij = scale * ((q_i + u) . k_j + (q_i + w) . tau_j) = scale * (q_i . (k_j + tau_j) + u . k_j + w . tau_j),
// or of the "rotary" form, where tau turns q, k and v: cpu/timestep_attention_rotary.h.
#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace pds {

// A tensor [batch, token, head, D] of float32 or bfloat16: strides in elements, the last one is 1.
struct HeadTensor {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

struct TimestepAttentionArgs {
  int64_t batch, heads, queries, keys, dim;   // of packed sentences: the most queries and keys of a sentence
  // Sentences without padding between them: sentence b has the tokens offsets[b] .. offsets[b + 1] - 1 of tensors without
  // a batch dimension (stride 0), and its part of lse is [heads, queries]. Null: none are packed. For CUDA; the CPU's
  // binding calls the kernel for one sentence after the other.
  const int64_t *query_offsets, *key_offsets;   // [batch + 1]
  int64_t first_head;           // what dropout adds to batch * heads + head
  bool bf16;
  float scale;
  HeadTensor q, k, v;
  HeadTensor tau;               // no data: plain attention
  bool rotary;                  // tau turns q, k and v of its token; queries = keys, no u and no w
  const int64_t* timesteps;     // [batch, keys]; when given, tau is a table and tau.token the stride of its rows
  const void *u, *w;            // [heads, dim] or null
  const uint8_t* key_mask;      // [batch, keys], nonzero = attend; null = all
  uint64_t seed;
  uint32_t drop_threshold;      // a probability is dropped where its 16 random bits are below this; 0 = no dropout
  void* out;                    // [batch, queries, heads, dim]; forward only
  float* lse;                   // [batch, heads, queries]: log of the sum of exp(score); written by forward

  // Backward only. Gradients are contiguous, but the rows of q's, and those of k's and v's, may lie further apart
  // (in the gradient of a fused projection); those of u and w come per sentence, for the caller to add up.
  HeadTensor grad_out;
  void *grad_q, *grad_k, *grad_v;
  int64_t grad_q_token, grad_k_token;   // elements from one token to the next
  void* grad_tau;               // [batch, keys, heads, dim], or null
  float* grad_tau_rows;         // for a table: the same as float, scattered into grad_table afterwards; rotary: workspace
  float* grad_table;            // [table_rows, heads, dim], or null: the caller adds up grad_tau_rows
  int64_t table_rows;
  float *grad_u, *grad_w;       // [batch, heads, dim] or null
  void *sum_u, *sum_w;          // [heads, dim] or null: their sums over the sentences; CPU only
};

// Dropout bits: the Philox block with counter (key / 8, kAttentionStream, query, first_head + batch * heads + head) serves
// 8 consecutive keys, two per word, lower half first.
constexpr uint32_t kAttentionStream = (2u << 24) | 1u;   // NoiseStream::dropout, step 1 (step 0 is ops.dropout)
constexpr float kDropUnit = 1.0f / 65536.0f;

PDS_DISPATCH(timestep_attention_forward, TimestepAttentionArgs)
PDS_DISPATCH(timestep_attention_backward, TimestepAttentionArgs)
PDS_DISPATCH(timestep_attention_sum_biases, TimestepAttentionArgs)   // sum_u and sum_w, after backward of all sentences

}  // namespace pds
