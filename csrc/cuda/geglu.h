// Launchers of the GEGLU kernels on CUDA: the argument blocks of the CPU kernels with pointers to device memory; `bf16` is
// not used (the dtype is in Launch).
#pragma once
#include "common/geglu.h"
#include "cuda/launch.h"

namespace pds {
namespace cuda {

Status geglu(const GegluArgs& args, const Launch& launch);
Status geglu_backward(const GegluArgs& args, const Launch& launch);

}  // namespace cuda
}  // namespace pds
