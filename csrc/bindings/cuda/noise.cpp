#include "cuda/noise.h"

#include "bindings/cuda/cuda.h"
#include "bindings/noise.h"

namespace py = pybind11;

namespace pds {
namespace {

// The arguments of the CPU functions in their order, with a dtype code (cuda/launch.h) for `bf16`; then whether `seed` is
// an address on the device (the kernel reads it) or on the host, the stream and the device index.
NoiseKey make_key_cuda(Address seed, bool seed_on_device, Address rows, uint32_t step) {
  return NoiseKey{host_seed(seed, seed_on_device), pointer<const int64_t>(rows), step};
}

void run_q_sample_cuda(Address source, Address ids, const Times& times, Address signal, Address sigma, Address mask,
                       Address absorbing, Address gone, Address x0, Address x_t, Address eps, Address seed, Address rows,
                       uint32_t step, int64_t B, int64_t N, int64_t d, int64_t T, int64_t V, float sigma0, int dtype,
                       bool seed_on_device, Address stream, int device) {
  const QSampleArgs args{pointer<const void>(source), pointer<const int64_t>(ids), token_times(times),
                         pointer<const float>(signal), pointer<const float>(sigma), pointer<const uint8_t>(mask),
                         pointer<const void>(absorbing), pointer<const uint8_t>(gone),
                         pointer<void>(x0), pointer<void>(x_t), pointer<void>(eps), nullptr, nullptr,
                         make_key_cuda(seed, seed_on_device, rows, step), B, N, d, T, V, sigma0, false};
  check_cuda(ids == 0 ? "q_sample" : "embed_q_sample",
             cuda::q_sample(args, device_seed(seed, seed_on_device), make_launch(dtype, stream, device)));
}

void run_q_sample_backward_cuda(Address grad, const Times& times, Address signal, Address mask, Address out, int64_t B,
                                int64_t N, int64_t d, int64_t T, int dtype, Address stream, int device) {
  const QSampleBackwardArgs args{pointer<const void>(grad), token_times(times), pointer<const float>(signal),
                                 pointer<const uint8_t>(mask), pointer<void>(out), B, N, d, T, false};
  check_cuda("q_sample_backward", cuda::q_sample_backward(args, make_launch(dtype, stream, device)));
}

// See cuda/noise.h.
void run_embed_backward_cuda(Address grad_x0, Address grad_x_t, const Times& times, Address signal, Address mask,
                             Address sorted_ids, Address sorted_tokens, Address partial, Address table, int64_t B, int64_t N,
                             int64_t d, int64_t T, int64_t V, int dtype, Address stream, int device) {
  const EmbedBackwardArgs args{pointer<const void>(grad_x0), pointer<const void>(grad_x_t), nullptr, token_times(times),
                               pointer<const float>(signal), pointer<const uint8_t>(mask), nullptr, B, N, d, T, V, false};
  const cuda::SortedTokens sorted{pointer<const int64_t>(sorted_ids), pointer<const int64_t>(sorted_tokens)};
  check_cuda("embed_q_sample_backward", cuda::embed_backward(args, sorted, pointer<float>(partial), pointer<void>(table),
                                                             make_launch(dtype, stream, device)));
}

void run_sampler_step_cuda(Address x, Address x0_hat, Address ids, Address a, Address b, Address c, Address out,
                           Address seed, Address rows, uint32_t step, int64_t B, int64_t N, int64_t d, int64_t V,
                           float limit, int dtype, bool seed_on_device, Address stream, int device) {
  const SamplerStepArgs args{pointer<const void>(x), pointer<const void>(x0_hat), pointer<const int64_t>(ids),
                             pointer<const float>(a), pointer<const float>(b), pointer<const float>(c),
                             pointer<void>(out), nullptr, make_key_cuda(seed, seed_on_device, rows, step), B, N, d, V,
                             limit, false};
  check_cuda("sampler_step",
             cuda::sampler_step(args, device_seed(seed, seed_on_device), make_launch(dtype, stream, device)));
}

void run_philox_normal_cuda(Address out, Address seed, Address rows, uint32_t step, uint32_t philox_stream, int64_t B,
                            int64_t N, int64_t d, int dtype, bool seed_on_device, Address stream, int device) {
  const NormalArgs args{pointer<void>(out), make_key_cuda(seed, seed_on_device, rows, step), philox_stream, B, N, d,
                        false};
  check_cuda("philox_normal",
             cuda::philox_normal(args, device_seed(seed, seed_on_device), make_launch(dtype, stream, device)));
}

}  // namespace

void bind_noise_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("noise_q_sample_cuda", &run_q_sample_cuda, no_gil);
  m.def("noise_q_sample_backward_cuda", &run_q_sample_backward_cuda, no_gil);
  m.def("noise_embed_backward_cuda", &run_embed_backward_cuda, no_gil);
  m.def("noise_sampler_step_cuda", &run_sampler_step_cuda, no_gil);
  m.def("noise_philox_normal_cuda", &run_philox_normal_cuda, no_gil);
}

}  // namespace pds
