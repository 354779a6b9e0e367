#include "cuda/noise.h"

#include "bindings/cuda/cuda.h"

namespace py = pybind11;

namespace pds {
namespace {

// The arguments of the CPU functions in their order, with a dtype code (cuda/launch.h) for `bf16`; then whether `seed` is
// an address on the device (the kernel reads it) or on the host, the stream and the device index.
NoiseKey make_key_cuda(Address seed, bool seed_on_device, Address rows, uint32_t step) {
  return NoiseKey{host_seed(seed, seed_on_device), pointer<const int64_t>(rows), step};
}

void run_q_sample_cuda(Address source, Address ids, Address t, Address signal, Address sigma, Address mask,
                       Address absorbing, Address gone, Address x0, Address x_t, Address eps, Address seed, Address rows,
                       uint32_t step, int64_t B, int64_t N, int64_t d, int64_t T, int64_t V, float sigma0, bool t_per_token, int dtype, bool seed_on_device,
                       Address stream, int device) {
  const QSampleArgs args{pointer<const void>(source), pointer<const int64_t>(ids), pointer<const int64_t>(t),
                         pointer<const float>(signal), pointer<const float>(sigma), pointer<const uint8_t>(mask),
                         pointer<const void>(absorbing), pointer<const uint8_t>(gone),
                         pointer<void>(x0), pointer<void>(x_t), pointer<void>(eps), nullptr, nullptr,
                         make_key_cuda(seed, seed_on_device, rows, step), B, N, d, T, V, sigma0, t_per_token, false};
  check_cuda(ids == 0 ? "q_sample" : "embed_q_sample",
             cuda::q_sample(args, device_seed(seed, seed_on_device), make_launch(dtype, stream, device)));
}

void run_q_sample_backward_cuda(Address grad, Address t, Address signal, Address mask, Address out, int64_t B,
                                int64_t N, int64_t d, int64_t T, bool t_per_token, int dtype, Address stream,
                                int device) {
  const QSampleBackwardArgs args{pointer<const void>(grad), pointer<const int64_t>(t), pointer<const float>(signal),
                                 pointer<const uint8_t>(mask), pointer<void>(out), B, N, d, T, t_per_token, false};
  check_cuda("q_sample_backward", cuda::q_sample_backward(args, make_launch(dtype, stream, device)));
}

void run_sampler_step_cuda(Address x, Address x0_hat, Address a, Address b, Address c, Address out, Address seed,
                           Address rows, uint32_t step, int64_t B, int64_t N, int64_t d, float limit, int dtype,
                           bool seed_on_device, Address stream, int device) {
  const SamplerStepArgs args{pointer<const void>(x), pointer<const void>(x0_hat), pointer<const float>(a),
                             pointer<const float>(b), pointer<const float>(c), pointer<void>(out),
                             make_key_cuda(seed, seed_on_device, rows, step), B, N, d, limit, false};
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
  m.def("noise_sampler_step_cuda", &run_sampler_step_cuda, no_gil);
  m.def("noise_philox_normal_cuda", &run_philox_normal_cuda, no_gil);
}

}  // namespace pds
