// Arguments of the noise kernels (q_sample, embed_q_sample, sampler_step, philox_normal and their backward passes).
// B sentences, N tokens each, d elements a token; float tensors are float32, or bfloat16 where `bf16` is set, contiguous.
#pragma once
#include <cstdint>

#include "common/token_times.h"
#include "cpu/dispatch.h"

namespace pds {

// Where in the Philox counter space a call draws (see philox.h).
struct NoiseKey {
  uint64_t seed;
  const int64_t* rows;   // [B]: candidate << 32 | sentence id; null: 0, 1, 2, ...
  uint32_t step;
};

// x_t = signal[t] x0 + sigma[t] eps. With `ids`, x0 = source[ids] + sigma0 eps' is computed (and stored) first. With
// `absorbing`, (1 - signal[t]) absorbing is added, and a token that is gone is `absorbing` alone.
struct QSampleArgs {
  const void* source;    // x0 [B, N, d], or the table [V, d]
  const int64_t* ids;    // [B, N] or null
  TokenTimes times;
  const float* signal;   // [T]
  const float* sigma;    // [T]
  const uint8_t* mask;   // [B, N] or null; 0: x_t = x0, eps = 0
  const void* absorbing; // [d] or null
  const uint8_t* gone;   // [B, N] or null; only with absorbing
  void* x0;              // [B, N, d] output, only with ids
  void* x_t;             // [B, N, d] output
  void* eps;             // [B, N, d] output or null
  int64_t* bad_t;        // receives the token whose timestep lies outside [0, T), else left alone
  int64_t* bad_id;       // the same for ids outside [0, V)
  NoiseKey key;
  int64_t B, N, d, T, V;
  float sigma0;
  bool bf16;
};

// out = signal[t] grad (grad where the mask is 0).
struct QSampleBackwardArgs {
  const void* grad;
  TokenTimes times;
  const float* signal;
  const uint8_t* mask;
  void* out;
  int64_t B, N, d, T;
  bool bf16;
};

// table[ids] += grad_x0 + signal[t] grad_x_t, in token order for every column (deterministic); the table is float32.
struct EmbedBackwardArgs {
  const void* grad_x0;    // either may be null
  const void* grad_x_t;
  const int64_t* ids;
  TokenTimes times;       // and signal: only with grad_x_t
  const float* signal;
  const uint8_t* mask;
  float* table;           // [V, d], starts at zero
  int64_t B, N, d, T, V;
  bool bf16;
};

// out = a x + b x0_hat + c eps with one coefficient a token, x0_hat clamped to -limit..limit.
struct SamplerStepArgs {
  const void* x;
  const void* x0_hat;   // [B, N, d], or with ids a table [V, d]
  const int64_t* ids;   // [B, N] or null
  const float* a;       // [B, N] each
  const float* b;
  const float* c;
  void* out;
  int64_t* bad_id;      // receives the token whose id lies outside [0, V), else left alone
  NoiseKey key;
  int64_t B, N, d, V;
  float limit;          // infinite: none
  bool bf16;
};

struct NormalArgs {
  void* out;   // [B, N, d]
  NoiseKey key;
  uint32_t stream;
  int64_t B, N, d;
  bool bf16;
};

// The raw words of `count` successive Philox blocks: counter word 0 runs from counter[0]. For known-answer tests.
struct PhiloxWordsArgs {
  uint32_t counter[4];
  uint64_t seed;
  int64_t count;
  uint32_t* out;   // [count, 4]
};

PDS_DISPATCH(q_sample, QSampleArgs)
PDS_DISPATCH(q_sample_backward, QSampleBackwardArgs)
PDS_DISPATCH(embed_backward, EmbedBackwardArgs)
PDS_DISPATCH(sampler_step, SamplerStepArgs)
PDS_DISPATCH(philox_normal, NormalArgs)
PDS_DISPATCH(philox_words, PhiloxWordsArgs)

}  // namespace pds
