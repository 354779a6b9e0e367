// Noise injection and the sampler's update on CUDA: the coordinates and in float32 the exact arithmetic of common/philox.h,
// hence the bits of the CPU kernels. 16-bit types round what their normals differ by, but for a last place now and then.
//
// A token (a row of d elements) belongs to a group of 2^k adjacent threads; each thread takes units of 16 bytes of the
// row (4 float32 or 8 half-precision elements, one or two Philox blocks). The grid strides over the tokens.
#include "cuda/noise.h"

#include "common/philox.h"
#include "cuda/units.cuh"

namespace pds {
namespace cuda {
namespace {

// --- The walk over tokens and units ---

struct Walk {
  Loop tokens;    // rows are sentences
  int64_t d;
  bool aligned;   // every row of every tensor starts at a multiple of 16 bytes
};

// Calls body(unit number, first element, count, whole) for every unit of the row that this thread takes.
template <typename T, typename Body>
__device__ __forceinline__ void for_each_unit(const Walk& walk, Body&& body) {
  const int64_t lanes = int64_t{1} << walk.tokens.lane_bits;
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

__device__ __forceinline__ Coordinates coordinates(const NoiseKey& key, uint64_t seed, NoiseStream stream,
                                                   int64_t sentence, int64_t n, int64_t d) {
  const uint64_t row = static_cast<uint64_t>(key.rows == nullptr ? sentence : __ldg(key.rows + sentence));
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), stream_word(stream, key.step),
          static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(n * ((d + 3) / 4))};
}

constexpr float kHalfPi = 1.5707964f;

// normal_pair to 4e-6, which 16-bit types hardly see: exact arithmetic would take them longer than memory does. Where the
// radius is below 0.04 (8 pairs of 10,000) the logarithm's absolute error counts for more: up to 6e-4 of it at radius 0.
__device__ __forceinline__ void quick_normal_pair(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  const float u = exact_fma(static_cast<float>(radius_word), kTwoToMinus32, kTwoToMinus33);
  const float radius = fast_sqrt(fabsf(fast_log2(u) * kMinusTwoLn2));
  const float signed_radius = bits_float(float_bits(radius) ^ (angle_word & 0x80000000u));
  const float one_to_two = bits_float((angle_word >> 7 & 0x7FFFFFu) ^ 0x3FC00000u);   // 23 bits of the angle
  const float t = exact_fma(one_to_two, kHalfPi, -1.5f * kHalfPi), sine = fast_sin(t), cosine = fast_cos(t);
  const bool swap = static_cast<int32_t>(angle_word << 1) < 0;
  first = signed_radius * (swap ? cosine : sine);
  second = signed_radius * (swap ? sine : cosine);
}

// The normals of one unit of the token.
template <typename T>
__device__ __forceinline__ void draw(const Coordinates& at, uint32_t unit, float normals[kUnit<T>]) {
  constexpr int kPhiloxBlocks = kUnit<T> / 4;
#pragma unroll
  for (int i = 0; i < kPhiloxBlocks; ++i) {
    uint32_t words[4] = {at.first_block + unit * kPhiloxBlocks + i, at.stream, at.sentence, at.candidate};
    philox10(words, at.key0, at.key1);
    if constexpr (sizeof(T) == 4) {
      normals4(words, normals);
    } else {
      quick_normal_pair(words[0], words[1], normals[4 * i], normals[4 * i + 1]);
      quick_normal_pair(words[2], words[3], normals[4 * i + 2], normals[4 * i + 3]);
    }
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
  const T* absorbing;   // or null
  float signal, sigma;
  bool noised, gone;
  Coordinates at;       // the stream of x_t
};

// x += (1 - signal) absorbing, or what is gone is `absorbing` alone.
template <typename T>
__device__ __forceinline__ void absorb_unit(const SampleRow<T>& row, int64_t offset, int count, bool whole, float x[kUnit<T>]) {
  const float drift = exact_add(1.f, -row.signal);
  float goal[kUnit<T>];
  load_unit(row.absorbing + offset, count, whole, goal);
#pragma unroll
  for (int i = 0; i < kUnit<T>; ++i) x[i] = row.gone ? goal[i] : exact_fma(drift, goal[i], x[i]);
}

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
    if (row.absorbing != nullptr) absorb_unit(row, offset, count, whole, x);
  } else {
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) noise[i] = 0.f;
  }
  store_unit(row.x_t + offset, count, whole, x);
  if (row.eps != nullptr) store_unit(row.eps + offset, count, whole, noise);
}

template <typename T>
__global__ void __launch_bounds__(kUnitThreads)
q_sample_kernel(const __grid_constant__ QSampleArgs args, const int64_t* device_seed,
                const __grid_constant__ Walk walk) {
  const uint64_t seed = key_of(args.key.seed, device_seed);
  const bool embed = args.ids != nullptr;
  for_each_item(walk.tokens, [&](int64_t token, int64_t sentence, int64_t n) {
    const int64_t t = args.times.at(token, sentence, n, args.T);
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
    row.absorbing = static_cast<const T*>(args.absorbing);
    row.gone = args.gone != nullptr && __ldg(args.gone + token) != 0;
    row.at = coordinates(args.key, seed, NoiseStream::x_t, sentence, n, args.d);
    for_each_unit<T>(walk, [&](uint32_t unit, int64_t offset, int count, bool whole) {
      q_sample_unit(row, args.key, args.sigma0, unit, offset, count, whole);
    });
  });
}

template <typename T>
__global__ void __launch_bounds__(kUnitThreads)
q_sample_backward_kernel(const __grid_constant__ QSampleBackwardArgs args, const __grid_constant__ Walk walk) {
  for_each_item(walk.tokens, [&](int64_t token, int64_t sentence, int64_t n) {
    const int64_t t = args.times.at(token, sentence, n, args.T);
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
__global__ void __launch_bounds__(kUnitThreads)
sampler_step_kernel(const __grid_constant__ SamplerStepArgs args, const int64_t* device_seed,
                    const __grid_constant__ Walk walk) {
  const uint64_t seed = key_of(args.key.seed, device_seed);
  for_each_item(walk.tokens, [&](int64_t token, int64_t sentence, int64_t n) {
    const T* x = static_cast<const T*>(args.x) + token * args.d;
    const int64_t goal_row = args.ids == nullptr ? token : __ldg(args.ids + token);
    T* out = row_of<T>(args.out, token, args.d);
    if (args.ids != nullptr && !inside(goal_row, args.V)) return fill_with_nan(walk, out);
    const T* x0_hat = static_cast<const T*>(args.x0_hat) + goal_row * args.d;
    const float a = __ldg(args.a + token), b = __ldg(args.b + token), c = __ldg(args.c + token);
    const Coordinates at = coordinates(args.key, seed, NoiseStream::x_t, sentence, n, args.d);
    for_each_unit<T>(walk, [&](uint32_t unit, int64_t offset, int count, bool whole) {
      float value[kUnit<T>], other[kUnit<T>];
      load_unit(x + offset, count, whole, value);
      load_unit(x0_hat + offset, count, whole, other);
#pragma unroll
      for (int i = 0; i < kUnit<T>; ++i) {
        const float goal = other[i] > args.limit ? args.limit : other[i] < -args.limit ? -args.limit : other[i];   // NaN stays
        value[i] = exact_fma(b, goal, exact_mul(a, value[i]));
      }
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
__global__ void __launch_bounds__(kUnitThreads)
normal_kernel(const __grid_constant__ NormalArgs args, const int64_t* device_seed,
              const __grid_constant__ Walk walk) {
  const uint64_t seed = key_of(args.key.seed, device_seed);
  const NoiseStream stream = static_cast<NoiseStream>(args.stream);
  for_each_item(walk.tokens, [&](int64_t token, int64_t sentence, int64_t n) {
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
  const bool aligned = d % unit == 0 && addresses % 16 == 0;
  return {make_loop(B, N, choose_lane_bits((d + unit - 1) / unit), processors, blocks), d, aligned};
}

// Calls run(zero of the element type, walk, grid), which launches, and returns the launch's error.
// `addresses`: those of all [.., d] tensors, or-ed.
template <typename Args, typename Run>
Status start_kernel(const Args& args, const Launch& launch, uintptr_t addresses, Run&& run) {
  if (args.B <= 0 || args.N <= 0 || args.d <= 0) return cudaSuccess;
  return with_element_type(launch, [&](auto zero, int processors) {
    unsigned blocks = 0;
    const Walk walk = choose_walk(args.B, args.N, args.d, sizeof zero, processors, addresses, blocks);
    return run(zero, walk, Grid{blocks, kUnitThreads, 0});
  });
}

}  // namespace

const char* error_string(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

Status q_sample(const QSampleArgs& args, const int64_t* device_seed, const Launch& launch) {
  const uintptr_t addresses =
      address(args.source) | address(args.absorbing) | address(args.x0) | address(args.x_t) | address(args.eps);
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
