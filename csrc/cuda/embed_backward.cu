// Gradient of embed_q_sample's table on CUDA: the gradients of both outputs, added up by id in a fixed order, without atomics.
//
// The tokens come sorted by id, in chunks of kEmbedChunk. A thread takes 16 bytes' worth of the columns of a chunk and adds
// them up run by run of equal ids, token by token. A run that lies within its chunk is a row of the table; of a longer one
// every chunk leaves a partial sum, and the second kernel adds those up from the first chunk to the last. So the order of a
// sum follows from the ids and not from the grid.
#include "cuda/noise.h"
#include "cuda/units.cuh"

namespace pds {
namespace cuda {
namespace {

struct Scatter {
  EmbedBackwardArgs args;
  SortedTokens sorted;
  float* partial;   // [chunks, 2, d]: of the run that comes in from the chunk before, and of that which goes on in the next
  void* table;
  Loop loop;        // rows are chunks, items units
  int64_t tokens;
  bool aligned;
};

// sum += gradient of x0 + signal[t] gradient of x_t, of the token's unit at `offset`.
template <typename T>
__device__ __forceinline__ void add_token(const Scatter& s, int64_t token, int64_t offset, int count, float sum[kUnit<T>]) {
  const EmbedBackwardArgs& a = s.args;
  float x[kUnit<T>];
  if (a.grad_x0 != nullptr) {
    load_unit(static_cast<const T*>(a.grad_x0) + token * a.d + offset, count, s.aligned, x);
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) sum[i] += x[i];
  }
  if (a.grad_x_t != nullptr) {
    const int64_t sentence = a.times.per_token ? 0 : token / a.N;   // what is not needed is not divided for
    const int64_t t = a.times.at(token, sentence, token - sentence * a.N, a.T);
    float signal = inside(t, a.T) ? __ldg(a.signal + t) : __int_as_float(0x7FC00000);
    if (a.mask != nullptr && __ldg(a.mask + token) == 0) signal = 1.f;
    load_unit(static_cast<const T*>(a.grad_x_t) + token * a.d + offset, count, s.aligned, x);
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) sum[i] = fmaf(signal, x[i], sum[i]);
  }
}

template <typename T>
__device__ __forceinline__ void store_sum(const Scatter& s, int64_t id, int64_t offset, int count, const float sum[kUnit<T>]) {
  if (inside(id, s.args.V)) store_unit(static_cast<T*>(s.table) + id * s.args.d + offset, count, s.aligned, sum);
}

template <typename T>
__global__ void __launch_bounds__(kUnitThreads, 4)   // 64 registers: ptxas would choose fewer and spill
embed_runs_kernel(const __grid_constant__ Scatter s) {
  for_each_item(s.loop, [&](int64_t, int64_t chunk, int64_t unit) {
    const int64_t d = s.args.d, offset = unit * kUnit<T>, begin = chunk * kEmbedChunk;
    const int64_t end = min(begin + kEmbedChunk, s.tokens);
    const int count = static_cast<int>(min(d - offset, int64_t{kUnit<T>}));
    int64_t id = __ldg(s.sorted.ids + begin);
    bool begins_here = begin == 0 || __ldg(s.sorted.ids + begin - 1) != id;
    float sum[kUnit<T>] = {};
#pragma unroll 2
    for (int64_t p = begin; p < end; ++p) {
      add_token<T>(s, __ldg(s.sorted.tokens + p), offset, count, sum);
      const bool last = p + 1 == s.tokens;
      const int64_t next = last ? id : __ldg(s.sorted.ids + p + 1);
      const bool ends_here = last || next != id;
      if (!ends_here && p + 1 < end) continue;
      if (begins_here && ends_here) {
        store_sum<T>(s, id, offset, count, sum);
      } else {
        float* out = s.partial + (2 * chunk + (begins_here ? 1 : 0)) * d + offset;
#pragma unroll
        for (int i = 0; i < kUnit<T>; ++i) {
          if (i < count) out[i] = sum[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kUnit<T>; ++i) sum[i] = 0.f;
      begins_here = true;
      id = next;
    }
  });
}

// The first chunk behind `chunk` that does not begin with `id`.
__device__ __forceinline__ int64_t end_of_run(const Scatter& s, int64_t chunk, int64_t id) {
  int64_t low = chunk + 1, high = (s.tokens + kEmbedChunk - 1) / kEmbedChunk;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (__ldg(s.sorted.ids + middle * kEmbedChunk) == id) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Each run over several chunks is added up by the threads of the chunk in which it begins.
template <typename T>
__global__ void __launch_bounds__(kUnitThreads) embed_long_runs_kernel(const __grid_constant__ Scatter s) {
  for_each_item(s.loop, [&](int64_t, int64_t chunk, int64_t unit) {
    const int64_t d = s.args.d, offset = unit * kUnit<T>, begin = chunk * kEmbedChunk, end = begin + kEmbedChunk;
    const int count = static_cast<int>(min(d - offset, int64_t{kUnit<T>}));
    if (end >= s.tokens) return;
    const int64_t id = __ldg(s.sorted.ids + end - 1);
    if (__ldg(s.sorted.ids + end) != id || (begin > 0 && __ldg(s.sorted.ids + begin - 1) == id)) return;
    const float* part = s.partial + (2 * chunk + 1) * d + offset;
    float sum[kUnit<T>];
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) sum[i] = i < count ? part[i] : 0.f;
    const int64_t last = end_of_run(s, chunk, id);
    part += d;   // of the next chunk's run that comes in
#pragma unroll 4
    for (int64_t c = chunk + 1; c < last; ++c, part += 2 * d) {
#pragma unroll
      for (int i = 0; i < kUnit<T>; ++i) sum[i] += i < count ? part[i] : 0.f;
    }
    store_sum<T>(s, id, offset, count, sum);
  });
}

}  // namespace

Status embed_backward(const EmbedBackwardArgs& args, const SortedTokens& sorted, float* partial, void* table,
                      const Launch& launch) {
  const int64_t tokens = args.B * args.N;
  if (tokens <= 0 || args.d <= 0) return cudaSuccess;
  return with_element_type(launch, [&](auto zero, int processors) {
    using T = decltype(zero);
    const uintptr_t addresses = address(args.grad_x0) | address(args.grad_x_t) | address(table);
    Scatter scatter{args, sorted, partial, table, {}, tokens, args.d % kUnit<T> == 0 && addresses % 16 == 0};
    unsigned blocks = 0;
    scatter.loop = make_loop((tokens + kEmbedChunk - 1) / kEmbedChunk, (args.d + kUnit<T> - 1) / kUnit<T>, 0, processors, blocks);
    const Grid grid{blocks, kUnitThreads, 0};
    const cudaError_t status = start(&embed_runs_kernel<T>, grid, launch, scatter);
    return status != cudaSuccess ? status : start(&embed_long_runs_kernel<T>, grid, launch, scatter);
  });
}

}  // namespace cuda
}  // namespace pds
