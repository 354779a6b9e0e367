// What the elementwise kernels share: units of 16 bytes, and a loop over rows of items that divides once.
#pragma once
#include <algorithm>

#include "cuda/device.cuh"

namespace pds {
namespace cuda {

constexpr int kUnitThreads = 256;
constexpr int kBlocksPerProcessor = 32;   // several waves: enough to even out the tail, few enough to reuse the set-up

template <typename T>
constexpr int kUnit = 16 / static_cast<int>(sizeof(T));   // elements that a thread takes at once

template <typename T>
struct alignas(16) Unit {
  T element[kUnit<T>];
};

// `whole`: all elements of the unit exist and the address is a multiple of 16.
template <typename T>
__device__ __forceinline__ void load_unit(const T* p, int count, bool whole, float x[kUnit<T>]) {
  if (whole) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
    const Unit<T>& unit = reinterpret_cast<const Unit<T>&>(raw);
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) x[i] = widen(unit.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) x[i] = i < count ? widen(p[i]) : 0.f;
  }
}

template <typename T>
__device__ __forceinline__ void store_unit(T* p, int count, bool whole, const float x[kUnit<T>]) {
  Unit<T> unit;
#pragma unroll
  for (int i = 0; i < kUnit<T>; ++i) narrow(x[i], unit.element[i]);
  if (whole) {
    *reinterpret_cast<Unit<T>*>(p) = unit;
  } else {
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) {
      if (i < count) p[i] = unit.element[i];
    }
  }
}

// A grid-stride loop over rows of `length` items, each of which 2^lane_bits adjacent threads share.
struct Loop {
  int64_t items, length;
  int64_t stride, stride_rows, stride_places;   // items in the grid, = stride_rows * length + stride_places
  int lane_bits;
};

// Calls body(item, row, place) for every item of this thread. Divides once, in 32 bits, before the loop.
template <typename Body>
__device__ __forceinline__ void for_each_item(const Loop& loop, Body&& body) {
  const uint32_t first = (blockIdx.x * kUnitThreads + threadIdx.x) >> loop.lane_bits;   // make_loop keeps it in 32 bits
  const uint32_t length = static_cast<uint32_t>(min(loop.length, int64_t{0xFFFFFFFF}));
  int64_t row = first / length, place = first % length;
#pragma unroll 1
  for (int64_t item = first; item < loop.items; item += loop.stride) {
    body(item, row, place);
    row += loop.stride_rows;
    place += loop.stride_places;
    if (place >= loop.length) {
      place -= loop.length;
      ++row;
    }
  }
}

inline Loop make_loop(int64_t rows, int64_t length, int lane_bits, int processors, unsigned& blocks) {
  Loop loop{};
  loop.items = rows * length;
  loop.length = length;
  loop.lane_bits = lane_bits;
  const int64_t in_block = kUnitThreads >> lane_bits, most = static_cast<int64_t>(processors) * kBlocksPerProcessor;
  blocks = static_cast<unsigned>(std::min((loop.items + in_block - 1) / in_block, most));
  loop.stride = blocks * in_block;
  loop.stride_rows = loop.stride / length;
  loop.stride_places = loop.stride % length;
  return loop;
}

// The key, which the kernel reads where it lies in device memory.
__device__ __forceinline__ uint64_t key_of(uint64_t seed, const int64_t* device_seed) {
  return device_seed == nullptr ? seed : static_cast<uint64_t>(__ldg(device_seed));
}

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Calls run(zero of the element type, number of multiprocessors) on the launch's device; returns its error.
template <typename Run>
Status with_element_type(const Launch& launch, Run&& run) {
  int processors = 0;
  const cudaError_t status = enter_device(launch.device, processors);
  if (status != cudaSuccess) return status;
  switch (launch.dtype) {
    case FloatType::float32: return run(float{}, processors);
    case FloatType::bfloat16: return run(__nv_bfloat16{}, processors);
    case FloatType::float16: return run(__half{}, processors);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace cuda
}  // namespace pds
