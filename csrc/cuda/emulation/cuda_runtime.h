// Stands in for CUDA's header of this name: the part of it that csrc/cuda uses, on the fibers of emulation.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/emulation/emulation.h"

#define PDS_CUDA_EMULATION 1
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::pds::emulation::thread_index())
#define blockIdx (::pds::emulation::block_index())
#define blockDim (::pds::emulation::block_size())
#define gridDim (::pds::emulation::grid_size())

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

using std::max;
using std::min;

template <typename T>
T __ldg(const T* p) { return *p; }

inline void __syncthreads() { pds::emulation::meet_block("__syncthreads", false); }
inline int __syncthreads_or(int vote) { return pds::emulation::meet_block("__syncthreads_or", vote != 0); }
inline void __syncwarp() { pds::emulation::meet_warp("__syncwarp", nullptr, [](void**) {}); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return pds::emulation::shuffle(value, lane); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return pds::emulation::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}

inline float normcdff(float x) { return static_cast<float>(0.5 * std::erfc(-std::sqrt(0.5) * static_cast<double>(x))); }
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t& emulated_last_error() {   // stays until somebody asks for it
  static cudaError_t error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulated_last_error();
  emulated_last_error() = cudaSuccess;
  return error;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device != 0) emulated_last_error() = cudaErrorInvalidValue;
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? pds::emulation::processors() : 101376;   // shared memory as on sm_86 and sm_89
  return cudaSuccess;
}
