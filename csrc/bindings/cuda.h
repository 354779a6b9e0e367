// What the bindings of the CUDA kernels share. Only used where PDS_CUDA is 1.
#pragma once
#include <stdexcept>
#include <string>

#include "bindings/module.h"
#include "cuda/launch.h"

namespace pds {

inline cuda::Launch make_launch(int dtype, Address stream, int device) {
  return {pointer<void>(stream), device, static_cast<cuda::FloatType>(dtype)};
}

// Becomes a RuntimeError in Python.
inline void check_cuda(const char* op, cuda::Status status) {
  if (status != 0) throw std::runtime_error(std::string(op) + ": CUDA error: " + cuda::error_string(status));
}

}  // namespace pds
