// Noise injection and the sampler's update on CUDA: the coordinates and the exact arithmetic of common/philox.h, hence
// the bits of the CPU kernels.
//
// A token (a row of d elements) belongs to a group of 2^k adjacent threads; each thread takes units of 16 bytes of the
// row (4 float32 or 8 half-precision elements, one or two Philox blocks). The grid strides over the tokens.
#include "cuda/noise.h"

#include <algorithm>

#include "common/philox.h"
#include "cuda/device.cuh"

namespace pds {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 32;   // several waves: enough to even out the tail, few enough to reuse the set-up

// --- Elements ---

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

// --- The walk over tokens and units ---

struct Walk {
  int64_t tokens, N, d;
  int64_t stride, stride_sentences, stride_n;   // groups in the grid, = stride_sentences * N + stride_n
  int lane_bits;                                // a token has 2^lane_bits threads
  bool aligned;                                 // every row of every tensor starts at a multiple of 16 bytes
};

// Calls body(token, sentence, n) for every token of this thread's group. Divides once, in 32 bits, before the loop.
template <typename Body>
__device__ __forceinline__ void for_each_token(const Walk& walk, Body&& body) {
  const uint32_t first = (blockIdx.x * kThreads + threadIdx.x) >> walk.lane_bits;   // choose_walk keeps it in 32 bits
  const uint32_t length = static_cast<uint32_t>(min(walk.N, int64_t{0xFFFFFFFF}));
  int64_t sentence = first / length, n = first % length;
#pragma unroll 1
  for (int64_t token = first; token < walk.tokens; token += walk.stride) {
    body(token, sentence, n);
    sentence += walk.stride_sentences;
    n += walk.stride_n;
    if (n >= walk.N) {
      n -= walk.N;
      ++sentence;
    }
  }
}

// Calls body(unit number, first element, count, whole) for every unit of the row that this thread takes.
template <typename T, typename Body>
__device__ __forceinline__ void for_each_unit(const Walk& walk, Body&& body) {
  const int64_t lanes = int64_t{1} << walk.lane_bits;
#pragma unroll 1
  for (int64_t unit = threadIdx.x & (lanes - 1); unit * kUnit<T> < walk.d; unit += lanes) {
    const int64_t offset = unit * kUnit<T>;
    const int count = static_cast<int>(min(walk.d - offset, int64_t{kUnit<T>}));
    body(static_cast<uint32_t>(unit), offset, count, walk.aligned);
  }
}

// --- Noise ---

struct Coordinates {
  uint32_t key0, key1, stream, sentence, candidate, first_block;
};

__device__ __forceinline__ uint64_t key_of(const NoiseKey& key, const int64_t* device_seed) {
  return device_seed == nullptr ? key.seed : static_cast<uint64_t>(__ldg(device_seed));
}

__device__ __forceinline__ Coordinates coordinates(const NoiseKey& key, uint64_t seed, NoiseStream stream,
                                                   int64_t sentence, int64_t n, int64_t d) {
  const uint64_t row = static_cast<uint64_t>(key.rows == nullptr ? sentence : __ldg(key.rows + sentence));
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), stream_word(stream, key.step),
          static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(n * ((d + 3) / 4))};
}

// The normals of one unit of the token.
template <typename T>
__device__ __forceinline__ void draw(const Coordinates& at, uint32_t unit, float normals[kUnit<T>]) {
  constexpr int kPhiloxBlocks = kUnit<T> / 4;
#pragma unroll
  for (int i = 0; i < kPhiloxBlocks; ++i) {
    uint32_t words[4] = {at.first_block + unit * kPhiloxBlocks + i, at.stream, at.sentence, at.candidate};
    philox10(words, at.key0, at.key1);
    normals4(words, normals + 4 * i);
  }
}

// --- Kernels ---

__device__ __forceinline__ bool clean(const uint8_t* mask, int64_t token) {
  return mask != nullptr && __ldg(mask + token) == 0;
}

template <typename T>
__device__ __forceinline__ T* row_of(void* tensor, int64_t row, int64_t d) {
  return tensor == nullptr ? nullptr : static_cast<T*>(tensor) + row * d;
}

template <typename T>
__device__ void fill_with_nan(const Walk& walk, T* row) {
  float nan[kUnit<T>];
#pragma unroll
  for (int i = 0; i < kUnit<T>; ++i) nan[i] = __int_as_float(0x7FC00000);
  if (row == nullptr) return;
  for_each_unit<T>(walk, [&](uint32_t, int64_t offset, int count, bool whole) {
    store_unit(row + offset, count, whole, nan);
  });
}

// What one token of q_sample needs, the same for all its elements.
template <typename T>
struct SampleRow {
  const T* source;
  T *x0, *x_t, *eps;
  float signal, sigma;
  bool noised;
  Coordinates at;       // the stream of x_t
};

// One unit: x0 = source + sigma0 eps', rounded to T before it is used (with ids only), then x_t = signal x0 + sigma eps.
template <typename T>
__device__ __forceinline__ void q_sample_unit(const SampleRow<T>& row, const NoiseKey& key, float sigma0, uint32_t unit,
                                              int64_t offset, int count, bool whole) {
  float x[kUnit<T>], noise[kUnit<T>];
  load_unit(row.source + offset, count, whole, x);
  if (row.x0 != nullptr) {
    if (sigma0 != 0.f) {
      Coordinates at = row.at;
      at.stream = stream_word(NoiseStream::x_0, key.step);
      draw<T>(at, unit, noise);
#pragma unroll
      for (int i = 0; i < kUnit<T>; ++i) {
        T rounded;
        narrow(exact_fma(sigma0, noise[i], x[i]), rounded);
        x[i] = widen(rounded);
      }
    }
    store_unit(row.x0 + offset, count, whole, x);
  }
  if (row.noised) {
    draw<T>(row.at, unit, noise);
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) x[i] = exact_fma(row.sigma, noise[i], exact_mul(row.signal, x[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) noise[i] = 0.f;
  }
  store_unit(row.x_t + offset, count, whole, x);
  if (row.eps != nullptr) store_unit(row.eps + offset, count, whole, noise);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
q_sample_kernel(const __grid_constant__ QSampleArgs args, const int64_t* device_seed,
                const __grid_constant__ Walk walk) {
  const uint64_t seed = key_of(args.key, device_seed);
  const bool embed = args.ids != nullptr;
  for_each_token(walk, [&](int64_t token, int64_t sentence, int64_t n) {
    const int64_t t = __ldg(args.t + (args.t_per_token ? token : sentence));
    const int64_t id = embed ? __ldg(args.ids + token) : token;
    SampleRow<T> row;
    row.x0 = embed ? row_of<T>(args.x0, token, args.d) : nullptr;
    row.x_t = row_of<T>(args.x_t, token, args.d);
    row.eps = row_of<T>(args.eps, token, args.d);
    if (!inside(t, args.T) || (embed && !inside(id, args.V))) {
      fill_with_nan(walk, row.x0);
      fill_with_nan(walk, row.x_t);
      fill_with_nan(walk, row.eps);
      return;
    }
    row.source = static_cast<const T*>(args.source) + id * args.d;
    row.signal = __ldg(args.signal + t);
    row.sigma = __ldg(args.sigma + t);
    row.noised = !clean(args.mask, token);
    row.at = coordinates(args.key, seed, NoiseStream::x_t, sentence, n, args.d);
    for_each_unit<T>(walk, [&](uint32_t unit, int64_t offset, int count, bool whole) {
      q_sample_unit(row, args.key, args.sigma0, unit, offset, count, whole);
    });
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
q_sample_backward_kernel(const __grid_constant__ QSampleBackwardArgs args, const __grid_constant__ Walk walk) {
  for_each_token(walk, [&](int64_t token, int64_t sentence, int64_t) {
    const int64_t t = __ldg(args.t + (args.t_per_token ? token : sentence));
    const T* grad = static_cast<const T*>(args.grad) + token * args.d;
    T* out = row_of<T>(args.out, token, args.d);
    if (!inside(t, args.T)) return fill_with_nan(walk, out);
    const float signal = clean(args.mask, token) ? 1.f : __ldg(args.signal + t);
    for_each_unit<T>(walk, [&](uint32_t, int64_t offset, int count, bool whole) {
      float x[kUnit<T>];
      load_unit(grad + offset, count, whole, x);
#pragma unroll
      for (int i = 0; i < kUnit<T>; ++i) x[i] = exact_mul(signal, x[i]);
      store_unit(out + offset, count, whole, x);
    });
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
sampler_step_kernel(const __grid_constant__ SamplerStepArgs args, const int64_t* device_seed,
                    const __grid_constant__ Walk walk) {
  const uint64_t seed = key_of(args.key, device_seed);
  for_each_token(walk, [&](int64_t token, int64_t sentence, int64_t n) {
    const T* x = static_cast<const T*>(args.x) + token * args.d;
    const T* x0_hat = static_cast<const T*>(args.x0_hat) + token * args.d;
    T* out = row_of<T>(args.out, token, args.d);
    const float a = __ldg(args.a + token), b = __ldg(args.b + token), c = __ldg(args.c + token);
    const Coordinates at = coordinates(args.key, seed, NoiseStream::x_t, sentence, n, args.d);
    for_each_unit<T>(walk, [&](uint32_t unit, int64_t offset, int count, bool whole) {
      float value[kUnit<T>], other[kUnit<T>];
      load_unit(x + offset, count, whole, value);
      load_unit(x0_hat + offset, count, whole, other);
#pragma unroll
      for (int i = 0; i < kUnit<T>; ++i) value[i] = exact_fma(b, other[i], exact_mul(a, value[i]));
      if (c != 0.f) {
        draw<T>(at, unit, other);
#pragma unroll
        for (int i = 0; i < kUnit<T>; ++i) value[i] = exact_fma(c, other[i], value[i]);
      }
      store_unit(out + offset, count, whole, value);
    });
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
normal_kernel(const __grid_constant__ NormalArgs args, const int64_t* device_seed,
              const __grid_constant__ Walk walk) {
  const uint64_t seed = key_of(args.key, device_seed);
  const NoiseStream stream = static_cast<NoiseStream>(args.stream);
  for_each_token(walk, [&](int64_t token, int64_t sentence, int64_t n) {
    T* out = row_of<T>(args.out, token, args.d);
    const Coordinates at = coordinates(args.key, seed, stream, sentence, n, args.d);
    for_each_unit<T>(walk, [&](uint32_t unit, int64_t offset, int count, bool whole) {
      float noise[kUnit<T>];
      draw<T>(at, unit, noise);
      store_unit(out + offset, count, whole, noise);
    });
  });
}

// --- Launches ---

// 2^k threads a token, k <= 8: the fewest idle ones; at least 16 (256 bytes side by side) where the row is that long.
int choose_lane_bits(int64_t units) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (int bits = 0; bits <= 8; ++bits) {
    const int64_t lanes = int64_t{1} << bits, slots = (units + lanes - 1) / lanes * lanes;
    const bool wide_enough = bits >= 4 || lanes >= units;
    if (wide_enough && slots <= least) {
      best = bits;
      least = slots;
    }
  }
  return best;
}

Walk choose_walk(int64_t B, int64_t N, int64_t d, int element_size, int processors, uintptr_t addresses,
                 unsigned& blocks) {
  const int unit = 16 / element_size;
  Walk walk{};
  walk.tokens = B * N;
  walk.N = N;
  walk.d = d;
  walk.lane_bits = choose_lane_bits((d + unit - 1) / unit);
  walk.aligned = d % unit == 0 && addresses % 16 == 0;
  const int64_t groups = kThreads >> walk.lane_bits;   // tokens that a block has in hand
  const int64_t most = static_cast<int64_t>(processors) * kBlocksPerProcessor;
  blocks = static_cast<unsigned>(std::min((walk.tokens + groups - 1) / groups, most));
  walk.stride = blocks * groups;
  walk.stride_sentences = walk.stride / N;
  walk.stride_n = walk.stride % N;
  return walk;
}

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Calls run(zero of the element type, walk, grid), which launches, and returns the launch's error.
// `addresses`: those of all [.., d] tensors, or-ed.
template <typename Args, typename Run>
Status start_kernel(const Args& args, const Launch& launch, uintptr_t addresses, Run&& run) {
  if (args.B <= 0 || args.N <= 0 || args.d <= 0) return cudaSuccess;
  int processors = 0;
  const cudaError_t status = enter_device(launch.device, processors);
  if (status != cudaSuccess) return status;
  const int size = launch.dtype == FloatType::float32 ? 4 : 2;
  unsigned blocks = 0;
  const Walk walk = choose_walk(args.B, args.N, args.d, size, processors, addresses, blocks);
  const Grid grid{blocks, kThreads, 0};
  switch (launch.dtype) {
    case FloatType::float32: return run(float{}, walk, grid);
    case FloatType::bfloat16: return run(__nv_bfloat16{}, walk, grid);
    case FloatType::float16: return run(__half{}, walk, grid);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

const char* error_string(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

Status q_sample(const QSampleArgs& args, const int64_t* device_seed, const Launch& launch) {
  const uintptr_t addresses = address(args.source) | address(args.x0) | address(args.x_t) | address(args.eps);
  return start_kernel(args, launch, addresses, [&](auto zero, const Walk& walk, const Grid& grid) {
    return start(&q_sample_kernel<decltype(zero)>, grid, launch, args, device_seed, walk);
  });
}

Status q_sample_backward(const QSampleBackwardArgs& args, const Launch& launch) {
  const uintptr_t addresses = address(args.grad) | address(args.out);
  return start_kernel(args, launch, addresses, [&](auto zero, const Walk& walk, const Grid& grid) {
    return start(&q_sample_backward_kernel<decltype(zero)>, grid, launch, args, walk);
  });
}

Status sampler_step(const SamplerStepArgs& args, const int64_t* device_seed, const Launch& launch) {
  const uintptr_t addresses = address(args.x) | address(args.x0_hat) | address(args.out);
  return start_kernel(args, launch, addresses, [&](auto zero, const Walk& walk, const Grid& grid) {
    return start(&sampler_step_kernel<decltype(zero)>, grid, launch, args, device_seed, walk);
  });
}

Status philox_normal(const NormalArgs& args, const int64_t* device_seed, const Launch& launch) {
  return start_kernel(args, launch, address(args.out), [&](auto zero, const Walk& walk, const Grid& grid) {
    return start(&normal_kernel<decltype(zero)>, grid, launch, args, device_seed, walk);
  });
}

}  // namespace cuda
}  // namespace pds
