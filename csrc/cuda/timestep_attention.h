// Launchers of timestep attention on CUDA for bfloat16 and float16, on the argument block of the CPU kernels with device
// pointers (`bf16` is not used). Head dimensions: multiples of 8 up to 128. The rows of q, k, v, tau and grad_out start at
// multiples of 16 bytes. A timestep outside the table makes the queries that attend to its key NaN.
#pragma once
#include "common/timestep_attention.h"
#include "cuda/launch.h"

namespace pds {
namespace cuda {

constexpr int kAttentionRows = 64;   // queries (or, in the gradient of the keys, keys) of a thread block

// `device_seed`: where the kernel finds the key in device memory; null: it is args.seed.
Status timestep_attention_forward(const TimestepAttentionArgs& args, const int64_t* device_seed, const Launch& launch);

// Reads args.out, the output of the forward pass. `delta`: workspace [batch, heads, queries]. grad_u and grad_w come in
// parts, [batch, heads, ceil(keys / kAttentionRows), dim], for the caller to add up; grad_table is not used.
Status timestep_attention_backward(const TimestepAttentionArgs& args, float* delta, const int64_t* device_seed,
                                   const Launch& launch);

}  // namespace cuda
}  // namespace pds
