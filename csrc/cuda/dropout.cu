// Dropout, alone or fused with the residual sum, on CUDA: the bits of the CPU kernel. A thread takes the eight elements of
// one Philox block at a time.
#include "cuda/dropout.h"

#include "common/philox.h"
#include "cuda/units.cuh"

namespace pds {
namespace cuda {
namespace {

// Element e of the block is dropped where this is below the threshold.
__device__ __forceinline__ uint32_t piece(const uint32_t words[4], int e) { return (words[e / 2] >> (e % 2 * 16)) & 0xFFFFu; }

template <typename T, bool kResidual>
__global__ void __launch_bounds__(kUnitThreads)
dropout_kernel(const __grid_constant__ DropoutArgs args, const int64_t* device_seed, const __grid_constant__ Loop loop, bool aligned) {
  const uint64_t seed = key_of(args.seed, device_seed);
  for_each_item(loop, [&](int64_t block, int64_t, int64_t) {
    uint32_t words[4] = {static_cast<uint32_t>(block), stream_word(NoiseStream::dropout, 0),
                         static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32), 0};
    philox10(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
#pragma unroll
    for (int first = 0; first < kDropoutElementsPerBlock; first += kUnit<T>) {
      const int64_t at = block * kDropoutElementsPerBlock + first;
      const int count = static_cast<int>(min(args.n - at, int64_t{kUnit<T>}));
      if (count <= 0) return;
      const bool whole = aligned && count == kUnit<T>;
      float x[kUnit<T>], residual[kUnit<T>];
      load_unit(static_cast<const T*>(args.x) + at, count, whole, x);
      if (kResidual) load_unit(static_cast<const T*>(args.residual) + at, count, whole, residual);
#pragma unroll
      for (int i = 0; i < kUnit<T>; ++i) {
        x[i] = piece(words, first + i) >= args.threshold ? exact_mul(x[i], args.scale) : 0.f;
        if (kResidual) x[i] = exact_add(residual[i], x[i]);
      }
      store_unit(static_cast<T*>(args.out) + at, count, whole, x);
    }
  });
}

}  // namespace

Status dropout(const DropoutArgs& args, const int64_t* device_seed, const Launch& launch) {
  if (args.n <= 0) return cudaSuccess;
  const bool aligned = (address(args.x) | address(args.residual) | address(args.out)) % 16 == 0;
  return with_element_type(launch, [&](auto zero, int processors) {
    unsigned blocks = 0;
    const int64_t items = (args.n + kDropoutElementsPerBlock - 1) / kDropoutElementsPerBlock;
    const Loop loop = make_loop(1, items, 0, processors, blocks);
    const Grid grid{blocks, kUnitThreads, 0};
    using T = decltype(zero);
    return args.residual != nullptr ? start(&dropout_kernel<T, true>, grid, launch, args, device_seed, loop, aligned)
                                    : start(&dropout_kernel<T, false>, grid, launch, args, device_seed, loop, aligned);
  });
}

}  // namespace cuda
}  // namespace pds
