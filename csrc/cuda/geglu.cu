// GEGLU on CUDA, the linear half times GELU of the gate with the exact normal distribution function, and its gradient. A
// thread takes 16 bytes of a row's linear half and the 16 of its gate.
#include "cuda/geglu.h"

#include "cuda/units.cuh"

namespace pds {
namespace cuda {
namespace {

// exp(-x^2 / 2) / sqrt(2 pi). The rounding of x^2 would become an error of up to 5e-6 in the exponential; here it is put back.
__device__ __forceinline__ float normal_density(float x) {
  const float square = x * x;
  if (square > 174.f) return 0.f;   // below 2^-126
  return expf(-0.5f * square) * (1.f - 0.5f * fmaf(x, x, -square)) * 0.398942280f;
}

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kUnitThreads)
geglu_kernel(const __grid_constant__ GegluArgs args, const __grid_constant__ Loop loop, bool aligned) {
  for_each_item(loop, [&](int64_t, int64_t row, int64_t unit) {
    const int64_t column = unit * kUnit<T>, linear = row * 2 * args.columns + column, half = row * args.columns + column;
    const int count = static_cast<int>(min(args.columns - column, int64_t{kUnit<T>}));
    const T* x = static_cast<const T*>(args.x) + linear;
    float a[kUnit<T>], gate[kUnit<T>], grad[kUnit<T>];
    load_unit(x, count, aligned, a);
    load_unit(x + args.columns, count, aligned, gate);
    if (kBackward) load_unit(static_cast<const T*>(args.grad) + half, count, aligned, grad);
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) {
      const float cdf = normcdff(gate[i]), gelu = gate[i] * cdf;
      if (kBackward) {
        const float slope = cdf + gate[i] * normal_density(gate[i]);
        gate[i] = grad[i] * a[i] * slope;
        a[i] = grad[i] * gelu;
      } else {
        a[i] *= gelu;
      }
    }
    T* out = static_cast<T*>(args.out) + (kBackward ? linear : half);
    store_unit(out, count, aligned, a);
    if (kBackward) store_unit(out + args.columns, count, aligned, gate);
  });
}

template <bool kBackward>
Status run(const GegluArgs& args, const Launch& launch) {
  if (args.rows <= 0 || args.columns <= 0) return cudaSuccess;
  return with_element_type(launch, [&](auto zero, int processors) {
    using T = decltype(zero);
    const bool aligned = args.columns % kUnit<T> == 0 && (address(args.x) | address(args.grad) | address(args.out)) % 16 == 0;
    unsigned blocks = 0;
    const Loop loop = make_loop(args.rows, (args.columns + kUnit<T> - 1) / kUnit<T>, 0, processors, blocks);
    return start(&geglu_kernel<T, kBackward>, Grid{blocks, kUnitThreads, 0}, launch, args, loop, aligned);
  });
}

}  // namespace

Status geglu(const GegluArgs& args, const Launch& launch) { return run<false>(args, launch); }
Status geglu_backward(const GegluArgs& args, const Launch& launch) { return run<true>(args, launch); }

}  // namespace cuda
}  // namespace pds
