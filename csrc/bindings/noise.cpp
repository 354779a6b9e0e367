#include <pybind11/stl.h>

#include "common/noise.h"

#include <array>
#include <vector>

#include "bindings/noise.h"

namespace py = pybind11;

namespace pds {
namespace {

// `seed` is the address of an int64: the key never travels through Python.
NoiseKey make_key(Address seed, Address rows, uint32_t step) {
  return NoiseKey{static_cast<uint64_t>(*pointer<const int64_t>(seed)), pointer<const int64_t>(rows), step};
}

// Returns (token with a bad t or -1, token with a bad id or -1).
std::pair<int64_t, int64_t> run_q_sample(Address source, Address ids, const Times& times, Address signal, Address sigma,
                                         Address mask, Address absorbing, Address gone, Address x0, Address x_t,
                                         Address eps, Address seed, Address rows, uint32_t step, int64_t B, int64_t N,
                                         int64_t d, int64_t T, int64_t V, float sigma0, bool bf16) {
  int64_t bad_t = -1, bad_id = -1;
  cpu::q_sample(QSampleArgs{pointer<const void>(source), pointer<const int64_t>(ids), token_times(times),
                            pointer<const float>(signal), pointer<const float>(sigma), pointer<const uint8_t>(mask),
                            pointer<const void>(absorbing), pointer<const uint8_t>(gone),
                            pointer<void>(x0), pointer<void>(x_t), pointer<void>(eps), &bad_t, &bad_id,
                            make_key(seed, rows, step), B, N, d, T, V, sigma0, bf16});
  return {bad_t, bad_id};
}

void run_q_sample_backward(Address grad, const Times& times, Address signal, Address mask, Address out, int64_t B,
                           int64_t N, int64_t d, int64_t T, bool bf16) {
  cpu::q_sample_backward(QSampleBackwardArgs{pointer<const void>(grad), token_times(times), pointer<const float>(signal),
                                             pointer<const uint8_t>(mask), pointer<void>(out), B, N, d, T, bf16});
}

void run_embed_backward(Address grad_x0, Address grad_x_t, Address ids, const Times& times, Address signal, Address mask,
                        Address table, int64_t B, int64_t N, int64_t d, int64_t T, int64_t V, bool bf16) {
  cpu::embed_backward(EmbedBackwardArgs{pointer<const void>(grad_x0), pointer<const void>(grad_x_t),
                                        pointer<const int64_t>(ids), token_times(times), pointer<const float>(signal),
                                        pointer<const uint8_t>(mask), pointer<float>(table), B, N, d, T, V, bf16});
}

// Returns the token with a bad id, or -1.
int64_t run_sampler_step(Address x, Address x0_hat, Address ids, Address a, Address b, Address c, Address out, Address seed,
                         Address rows, uint32_t step, int64_t B, int64_t N, int64_t d, int64_t V, float limit, bool bf16) {
  int64_t bad_id = -1;
  cpu::sampler_step(SamplerStepArgs{pointer<const void>(x), pointer<const void>(x0_hat), pointer<const int64_t>(ids),
                                    pointer<const float>(a), pointer<const float>(b), pointer<const float>(c),
                                    pointer<void>(out), &bad_id, make_key(seed, rows, step), B, N, d, V, limit, bf16});
  return bad_id;
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

}  // namespace

void bind_noise(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("q_sample", &run_q_sample, no_gil);
  m.def("q_sample_backward", &run_q_sample_backward, no_gil);
  m.def("embed_backward", &run_embed_backward, no_gil);
  m.def("sampler_step", &run_sampler_step, no_gil);
  m.def("philox_normal", &run_philox_normal, no_gil);
  m.def("philox_words", &run_philox_words, no_gil);
}

}  // namespace pds
