// Launcher of the dropout kernel on CUDA: the argument block of the CPU kernel with pointers to device memory; `bf16` is not
// used (the dtype is in Launch).
#pragma once
#include "common/dropout.h"
#include "cuda/launch.h"

namespace pds {
namespace cuda {

// `device_seed`: where the kernel finds the key in device memory; null: it is args.seed.
Status dropout(const DropoutArgs& args, const int64_t* device_seed, const Launch& launch);

}  // namespace cuda
}  // namespace pds
