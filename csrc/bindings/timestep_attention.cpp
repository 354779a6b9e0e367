#include <string>

#include "bindings/timestep_attention.h"

namespace py = pybind11;

namespace pds {
namespace {

void check_timesteps(const TimestepAttentionArgs& a) {
  for (int64_t n = 0; a.timesteps && n < a.batch * a.keys; ++n)
    if (a.timesteps[n] < 0 || a.timesteps[n] >= a.table_rows)
      throw py::value_error("timesteps must be in 0.." + std::to_string(a.table_rows - 1) + " (rows of tau), got " +
                            std::to_string(a.timesteps[n]));
}

}  // namespace

void bind_timestep_attention(py::module_& m) {
  m.def("timestep_attention_forward",
        [](const py::tuple& sizes, bool bf16, float scale, const py::tuple& inputs, Address timesteps, Address u, Address w,
           Address key_mask, int64_t table_rows, uint64_t seed, uint32_t drop_threshold, Address lse, bool rotary,
           Address out) {
          TimestepAttentionArgs a =
              common_args(sizes, bf16, scale, inputs, timesteps, u, w, key_mask, table_rows, seed, drop_threshold, lse);
          a.rotary = rotary;
          a.out = pointer<void>(out);
          check_timesteps(a);
          py::gil_scoped_release release;
          cpu::timestep_attention_forward(a);
        });
  // grads as in set_gradients, then the elements between tokens in the gradients of q, and of k and v
  m.def("timestep_attention_backward",
        [](const py::tuple& sizes, bool bf16, float scale, const py::tuple& inputs, Address timesteps, Address u, Address w,
           Address key_mask, int64_t table_rows, uint64_t seed, uint32_t drop_threshold, Address lse, bool rotary,
           const py::tuple& grad_out,
           const py::tuple& grads) {
          TimestepAttentionArgs a =
              common_args(sizes, bf16, scale, inputs, timesteps, u, w, key_mask, table_rows, seed, drop_threshold, lse);
          a.rotary = rotary;
          a.grad_out = head_tensor(grad_out);
          set_gradients(a, grads);
          a.grad_q_token = grads[8].cast<int64_t>();
          a.grad_k_token = grads[9].cast<int64_t>();
          check_timesteps(a);
          py::gil_scoped_release release;
          cpu::timestep_attention_backward(a);
        });
}

}  // namespace pds
