// What the bindings of the CUDA kernels share. This folder is only compiled where PDS_CUDA is 1 (and for the emulation).
#pragma once
#include <stdexcept>
#include <string>

#include "bindings/module.h"
#include "cuda/launch.h"

namespace pds {

inline cuda::Launch make_launch(int dtype, Address stream, int device) {
  return {pointer<void>(stream), device, static_cast<cuda::FloatType>(dtype)};
}

// A Philox key lies on the host, where it is read at the call, or on the device, where the kernel reads it.
inline uint64_t host_seed(Address seed, bool on_device) {
  return seed == 0 || on_device ? 0 : static_cast<uint64_t>(*pointer<const int64_t>(seed));
}
inline const int64_t* device_seed(Address seed, bool on_device) {
  return on_device ? pointer<const int64_t>(seed) : nullptr;
}

// Becomes a RuntimeError in Python.
inline void check_cuda(const char* op, cuda::Status status) {
  if (status != 0) throw std::runtime_error(std::string(op) + ": CUDA error: " + cuda::error_string(status));
}

void bind_noise_cuda(pybind11::module_& m);
void bind_dropout_cuda(pybind11::module_& m);
void bind_geglu_cuda(pybind11::module_& m);
void bind_nearest_cuda(pybind11::module_& m);
void bind_cross_entropy_cuda(pybind11::module_& m);
void bind_timestep_attention_cuda(pybind11::module_& m);

inline void bind_cuda(pybind11::module_& m) {
  bind_noise_cuda(m);
  bind_dropout_cuda(m);
  bind_geglu_cuda(m);
  bind_nearest_cuda(m);
  bind_cross_entropy_cuda(m);
  bind_timestep_attention_cuda(m);
}

}  // namespace pds
