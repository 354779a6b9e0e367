// What every kernel file shares: element types, launching, devices. Compiled by nvcc, or as C++ for the emulation.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"

// Dynamic shared memory as an array of bytes.
#ifdef PDS_CUDA_EMULATION
#define PDS_SHARED_MEMORY(name) unsigned char* const name = ::pds::emulation::shared_memory()
#else
#define PDS_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace pds {
namespace cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

__device__ __forceinline__ bool inside(int64_t index, int64_t size) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
}

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

template <typename T>
__device__ __forceinline__ T sum_over_warp(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kWholeWarp, value, mask);
  return value;
}

// One instruction each on the device.
#ifdef PDS_CUDA_EMULATION
#define PDS_FAST_FUNCTION(name, instruction, on_host) \
  inline float name(float x) { return on_host(x); }
#else
#define PDS_FAST_FUNCTION(name, instruction, on_host)           \
  __device__ __forceinline__ float name(float x) {              \
    float y;                                                    \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                                   \
  }
#endif
PDS_FAST_FUNCTION(fast_exp2, "ex2", std::exp2)    // to 2 ulp, with 0 for results below 2^-126
PDS_FAST_FUNCTION(fast_log2, "lg2", std::log2)    // to 2^-22, absolutely between 1/2 and 2, else relatively
PDS_FAST_FUNCTION(fast_sqrt, "sqrt", std::sqrt)   // to 2^-23, relatively
PDS_FAST_FUNCTION(fast_sin, "sin", std::sin)      // to 2^-20.5 from -pi to pi
PDS_FAST_FUNCTION(fast_cos, "cos", std::cos)
#undef PDS_FAST_FUNCTION

// x, as a value of which the compiler knows nothing: what depends on it is computed here and not kept in registers from before.
__device__ __forceinline__ int computed_anew(int x) {
#ifndef PDS_CUDA_EMULATION
  asm volatile("" : "+r"(x));
#endif
  return x;
}

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
};

// Queues kernel(arguments...) on the stream and returns the launch's error; no blocks: nothing to do.
template <typename... Parameters, typename... Arguments>
cudaError_t start(void (*kernel)(Parameters...), const Grid& grid, const Launch& launch, const Arguments&... arguments) {
  if (grid.blocks == 0) return cudaSuccess;
  if (grid.blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  (void)cudaGetLastError();   // the error of an earlier call, which has returned it, is not this launch's
#ifdef PDS_CUDA_EMULATION
  (void)launch;
  emulation::run_grid(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.threads), grid.shared_bytes,
                      [&] { kernel(arguments...); });
#else
  if (grid.shared_bytes > 48 << 10) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(grid.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(
      arguments...);
#endif
  return cudaGetLastError();
}

// Sets the device (our runtime is not torch's) and returns its number of multiprocessors.
inline cudaError_t enter_device(int device, int& processors) {
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace cuda
}  // namespace pds
