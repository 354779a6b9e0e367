// Launchers of the noise kernels on CUDA. They take the argument blocks of the CPU kernels with pointers to device
// memory; `bf16`, `bad_t` and `bad_id` are not used (the dtype is in Launch, and a token whose t or id is out of range
// becomes NaN, as an error could not be raised without waiting for the device).
#pragma once
#include "common/noise.h"
#include "cuda/launch.h"

namespace pds {
namespace cuda {

// `device_seed`: where the kernel finds the key in device memory; null: it is args.key.seed.
Status q_sample(const QSampleArgs& args, const int64_t* device_seed, const Launch& launch);
Status q_sample_backward(const QSampleBackwardArgs& args, const Launch& launch);
Status sampler_step(const SamplerStepArgs& args, const int64_t* device_seed, const Launch& launch);
Status philox_normal(const NormalArgs& args, const int64_t* device_seed, const Launch& launch);

}  // namespace cuda
}  // namespace pds
