// Kernels with one mistake each, and their correct forms: does the emulation notice? Each copies 64 floats through shared
// memory, reversed.
#include "bindings/module.h"
#include "cuda/mma.cuh"

namespace pds {
namespace cuda {
namespace {

constexpr int kThreads = 64;

enum class Fault { none, no_barrier, no_wait, lanes_apart, barrier_apart, outside, unaligned, behind, too_much, odd_vector };

__global__ void reverse_kernel(const float* from, float* to, Fault fault) {
  PDS_SHARED_MEMORY(shared);
  float* values = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x;
  if (i < 16) {
    const SharedAddress target = shared_address(shared) + 16 * i;
    const int shift = fault == Fault::outside && i == 15 ? 16 : fault == Fault::unaligned ? 4 : 0;
    copy_async(target + shift, from + 4 * i, true);
  }
  commit_copies();
  if (fault != Fault::no_wait) wait_copies<0>();
  if (fault == Fault::lanes_apart && i % 2 == 0) __shfl_xor_sync(kWholeWarp, i, 1);
  else __syncwarp();
  if (fault == Fault::barrier_apart && i < 32) __syncthreads_or(1);
  else if (fault != Fault::no_barrier) __syncthreads();
  to[i] = values[kThreads - 1 - i];
  if (fault == Fault::odd_vector) to[i] += static_cast<float>(__ldg(reinterpret_cast<const uint4*>(from + 1)).x);
  if (fault == Fault::behind) values[kThreads + i] = 0.f;
}

void reverse(Address from, Address to, int fault) {
  const Grid grid{1, kThreads, static_cast<Fault>(fault) == Fault::too_much ? size_t{1} << 20 : kThreads * sizeof(float)};
  start(&reverse_kernel, grid, Launch{}, pointer<const float>(from), pointer<float>(to), static_cast<Fault>(fault));
}

}  // namespace

void bind_faulty(pybind11::module_& m) { m.def("reverse", &reverse); }

}  // namespace cuda
}  // namespace pds

PYBIND11_MODULE(faulty, m) {
  m.def("set_order", [](int order) { pds::emulation::set_order(static_cast<pds::emulation::Order>(order)); });
  pds::cuda::bind_faulty(m);
}
