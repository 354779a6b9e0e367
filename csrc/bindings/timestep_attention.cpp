#include <string>

#include "bindings/module.h"
#include "common/timestep_attention.h"

namespace py = pybind11;

namespace pds {
namespace {

// (address, batch stride, token stride, head stride)
HeadTensor head_tensor(const py::tuple& t) {
  HeadTensor out;
  out.data = pointer<const void>(t[0].cast<Address>());
  out.batch = t[1].cast<int64_t>();
  out.token = t[2].cast<int64_t>();
  out.head = t[3].cast<int64_t>();
  return out;
}

void check_timesteps(const TimestepAttentionArgs& a) {
  for (int64_t n = 0; a.timesteps && n < a.batch * a.keys; ++n)
    if (a.timesteps[n] < 0 || a.timesteps[n] >= a.table_rows)
      throw py::value_error("timesteps must be in 0.." + std::to_string(a.table_rows - 1) + " (rows of tau), got " +
                            std::to_string(a.timesteps[n]));
}

// inputs = (q, k, v, tau) as in head_tensor; sizes = (batch, heads, queries, keys, dim).
TimestepAttentionArgs common_args(const py::tuple& sizes, bool bf16, float scale, const py::tuple& inputs, Address timesteps,
                                  Address u, Address w, Address key_mask, int64_t table_rows, uint64_t seed,
                                  uint32_t drop_threshold, Address lse) {
  TimestepAttentionArgs a{};
  a.batch = sizes[0].cast<int64_t>();
  a.heads = sizes[1].cast<int64_t>();
  a.queries = sizes[2].cast<int64_t>();
  a.keys = sizes[3].cast<int64_t>();
  a.dim = sizes[4].cast<int64_t>();
  a.bf16 = bf16;
  a.scale = scale;
  a.q = head_tensor(inputs[0].cast<py::tuple>());
  a.k = head_tensor(inputs[1].cast<py::tuple>());
  a.v = head_tensor(inputs[2].cast<py::tuple>());
  a.tau = head_tensor(inputs[3].cast<py::tuple>());
  a.timesteps = pointer<const int64_t>(timesteps);
  a.u = pointer<const void>(u);
  a.w = pointer<const void>(w);
  a.key_mask = pointer<const uint8_t>(key_mask);
  a.table_rows = table_rows;
  a.seed = seed;
  a.drop_threshold = drop_threshold;
  a.lse = pointer<float>(lse);
  check_timesteps(a);
  return a;
}

}  // namespace

void bind_timestep_attention(py::module_& m) {
  m.def("timestep_attention_forward",
        [](const py::tuple& sizes, bool bf16, float scale, const py::tuple& inputs, Address timesteps, Address u, Address w,
           Address key_mask, int64_t table_rows, uint64_t seed, uint32_t drop_threshold, Address lse,
           Address out) {
          TimestepAttentionArgs a =
              common_args(sizes, bf16, scale, inputs, timesteps, u, w, key_mask, table_rows, seed, drop_threshold, lse);
          a.out = pointer<void>(out);
          py::gil_scoped_release release;
          cpu::timestep_attention_forward(a);
        });
  // grads = (q, k, v, tau, tau rows, table, u, w), 0 where not wanted
  m.def("timestep_attention_backward",
        [](const py::tuple& sizes, bool bf16, float scale, const py::tuple& inputs, Address timesteps, Address u, Address w,
           Address key_mask, int64_t table_rows, uint64_t seed, uint32_t drop_threshold, Address lse,
           const py::tuple& grad_out,
           const py::tuple& grads) {
          TimestepAttentionArgs a =
              common_args(sizes, bf16, scale, inputs, timesteps, u, w, key_mask, table_rows, seed, drop_threshold, lse);
          const auto address = [&](int i) { return grads[i].cast<Address>(); };
          a.grad_out = head_tensor(grad_out);
          a.grad_q = pointer<void>(address(0));
          a.grad_k = pointer<void>(address(1));
          a.grad_v = pointer<void>(address(2));
          a.grad_tau = pointer<void>(address(3));
          a.grad_tau_rows = pointer<float>(address(4));
          a.grad_table = pointer<float>(address(5));
          a.grad_u = pointer<float>(address(6));
          a.grad_w = pointer<float>(address(7));
          py::gil_scoped_release release;
          cpu::timestep_attention_backward(a);
        });
}

}  // namespace pds
