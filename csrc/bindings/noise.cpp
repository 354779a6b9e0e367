#include <pybind11/stl.h>

#include "common/noise.h"

#include <array>
#include <vector>

#include "bindings/module.h"
#if PDS_CUDA
#include "bindings/cuda.h"
#include "cuda/noise.h"
#endif

namespace py = pybind11;

namespace pds {
namespace {

// `seed` is the address of an int64: the key never travels through Python.
NoiseKey make_key(Address seed, Address rows, uint32_t step) {
  return NoiseKey{static_cast<uint64_t>(*pointer<const int64_t>(seed)), pointer<const int64_t>(rows), step};
}

// Returns (token with a bad t or -1, token with a bad id or -1).
std::pair<int64_t, int64_t> run_q_sample(Address source, Address ids, Address t, Address signal, Address sigma,
                                         Address mask, Address x0, Address x_t, Address eps, Address seed, Address rows,
                                         uint32_t step, int64_t B, int64_t N, int64_t d, int64_t T, int64_t V,
                                         float sigma0, bool t_per_token, bool bf16) {
  int64_t bad_t = -1, bad_id = -1;
  cpu::q_sample(QSampleArgs{pointer<const void>(source), pointer<const int64_t>(ids), pointer<const int64_t>(t),
                            pointer<const float>(signal), pointer<const float>(sigma), pointer<const uint8_t>(mask),
                            pointer<void>(x0), pointer<void>(x_t), pointer<void>(eps), &bad_t, &bad_id,
                            make_key(seed, rows, step), B, N, d, T, V, sigma0, t_per_token, bf16});
  return {bad_t, bad_id};
}

void run_q_sample_backward(Address grad, Address t, Address signal, Address mask, Address out, int64_t B, int64_t N,
                           int64_t d, int64_t T, bool t_per_token, bool bf16) {
  cpu::q_sample_backward(QSampleBackwardArgs{pointer<const void>(grad), pointer<const int64_t>(t),
                                             pointer<const float>(signal), pointer<const uint8_t>(mask),
                                             pointer<void>(out), B, N, d, T, t_per_token, bf16});
}

void run_embed_backward(Address grad_x0, Address grad_x_t, Address ids, Address t, Address signal, Address mask,
                        Address table, int64_t B, int64_t N, int64_t d, int64_t T, int64_t V, bool t_per_token,
                        bool bf16) {
  cpu::embed_backward(EmbedBackwardArgs{pointer<const void>(grad_x0), pointer<const void>(grad_x_t),
                                        pointer<const int64_t>(ids), pointer<const int64_t>(t),
                                        pointer<const float>(signal), pointer<const uint8_t>(mask),
                                        pointer<float>(table), B, N, d, T, V, t_per_token, bf16});
}

void run_sampler_step(Address x, Address x0_hat, Address a, Address b, Address c, Address out, Address seed,
                      Address rows, uint32_t step, int64_t B, int64_t N, int64_t d, bool bf16) {
  cpu::sampler_step(SamplerStepArgs{pointer<const void>(x), pointer<const void>(x0_hat), pointer<const float>(a),
                                    pointer<const float>(b), pointer<const float>(c), pointer<void>(out),
                                    make_key(seed, rows, step), B, N, d, bf16});
}

void run_philox_normal(Address out, Address seed, Address rows, uint32_t step, uint32_t stream, int64_t B, int64_t N,
                       int64_t d, bool bf16) {
  cpu::philox_normal(NormalArgs{pointer<void>(out), make_key(seed, rows, step), stream, B, N, d, bf16});
}

std::vector<uint32_t> run_philox_words(std::array<uint32_t, 4> counter, uint64_t seed, int64_t count) {
  std::vector<uint32_t> out(static_cast<size_t>(4 * count));
  cpu::philox_words(PhiloxWordsArgs{{counter[0], counter[1], counter[2], counter[3]}, seed, count, out.data()});
  return out;
}

#if PDS_CUDA

// The arguments of the CPU functions in their order, with a dtype code (cuda/launch.h) for `bf16`; then whether `seed` is
// an address on the device (the kernel reads it) or on the host, the stream and the device index.
NoiseKey make_key_cuda(Address seed, bool seed_on_device, Address rows, uint32_t step) {
  return seed_on_device ? NoiseKey{0, pointer<const int64_t>(rows), step} : make_key(seed, rows, step);
}

const int64_t* device_seed(Address seed, bool seed_on_device) {
  return seed_on_device ? pointer<const int64_t>(seed) : nullptr;
}

void run_q_sample_cuda(Address source, Address ids, Address t, Address signal, Address sigma, Address mask, Address x0,
                       Address x_t, Address eps, Address seed, Address rows, uint32_t step, int64_t B, int64_t N,
                       int64_t d, int64_t T, int64_t V, float sigma0, bool t_per_token, int dtype, bool seed_on_device,
                       Address stream, int device) {
  const QSampleArgs args{pointer<const void>(source), pointer<const int64_t>(ids), pointer<const int64_t>(t),
                         pointer<const float>(signal), pointer<const float>(sigma), pointer<const uint8_t>(mask),
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
                           Address rows, uint32_t step, int64_t B, int64_t N, int64_t d, int dtype, bool seed_on_device,
                           Address stream, int device) {
  const SamplerStepArgs args{pointer<const void>(x), pointer<const void>(x0_hat), pointer<const float>(a),
                             pointer<const float>(b), pointer<const float>(c), pointer<void>(out),
                             make_key_cuda(seed, seed_on_device, rows, step), B, N, d, false};
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

#endif

}  // namespace

void bind_noise(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("q_sample", &run_q_sample, no_gil);
  m.def("q_sample_backward", &run_q_sample_backward, no_gil);
  m.def("embed_backward", &run_embed_backward, no_gil);
  m.def("sampler_step", &run_sampler_step, no_gil);
  m.def("philox_normal", &run_philox_normal, no_gil);
  m.def("philox_words", &run_philox_words, no_gil);
#if PDS_CUDA
  m.def("noise_q_sample_cuda", &run_q_sample_cuda, no_gil);
  m.def("noise_q_sample_backward_cuda", &run_q_sample_backward_cuda, no_gil);
  m.def("noise_sampler_step_cuda", &run_sampler_step_cuda, no_gil);
  m.def("noise_philox_normal_cuda", &run_philox_normal_cuda, no_gil);
#endif
}

}  // namespace pds
