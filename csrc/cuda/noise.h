// Launchers of the noise kernels on CUDA. They take the argument blocks of the CPU kernels with pointers to device
// memory; `bf16`, `bad_t` and `bad_id` are not used (the dtype is in Launch, and a token whose time or id is out of range
// becomes NaN, as an error could not be raised without waiting for the device).
#pragma once
#include "common/noise.h"
#include "cuda/launch.h"

namespace pds {
namespace cuda {

// `device_seed`: where the kernel finds the key in device memory; null: it is args.key.seed.
Status q_sample(const QSampleArgs& args, const int64_t* device_seed, const Launch& launch);
Status q_sample_backward(const QSampleBackwardArgs& args, const Launch& launch);

// The tokens 0 .. B N - 1 sorted by id, stably.
struct SortedTokens {
  const int64_t *ids, *tokens;
};
constexpr int64_t kEmbedChunk = 32;   // sorted tokens whose gradients are added up together, in order

// Writes the rows of `table` [V, d], of Launch's type, that have tokens; the others are left as they are. args.ids and args.table
// are not used. `partial`: workspace [ceil(B N / kEmbedChunk), 2, d]. Sums are float32, their order depends on the ids alone.
Status embed_backward(const EmbedBackwardArgs& args, const SortedTokens& sorted, float* partial, void* table,
                      const Launch& launch);

Status sampler_step(const SamplerStepArgs& args, const int64_t* device_seed, const Launch& launch);
Status philox_normal(const NormalArgs& args, const int64_t* device_seed, const Launch& launch);

}  // namespace cuda
}  // namespace pds
