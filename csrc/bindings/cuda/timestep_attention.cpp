#include "cuda/timestep_attention.h"

#include "bindings/cuda/cuda.h"
#include "bindings/timestep_attention.h"

namespace py = pybind11;

namespace pds {

void bind_timestep_attention_cuda(py::module_& m) {
  // `offsets`: addresses of those of the queries and the keys of packed sentences, or 0.
  m.def("timestep_attention_forward_cuda",
        [](const py::tuple& sizes, float scale, const py::tuple& inputs, Address timesteps, Address u, Address w,
           Address key_mask, int64_t table_rows, uint32_t drop_threshold, Address lse, bool rotary, const py::tuple& offsets,
           Address out, Address seed, bool seed_on_device, int dtype, Address stream, int device) {
          TimestepAttentionArgs a = common_args(sizes, false, scale, inputs, timesteps, u, w, key_mask, table_rows,
                                                host_seed(seed, seed_on_device), drop_threshold, lse);
          a.rotary = rotary;
          set_offsets(a, offsets);
          a.out = pointer<void>(out);
          py::gil_scoped_release release;
          check_cuda("timestep_attention", cuda::timestep_attention_forward(a, device_seed(seed, seed_on_device),
                                                                            make_launch(dtype, stream, device)));
        });
  // `out` is that of the forward pass; `delta` is workspace (see cuda/timestep_attention.h).
  m.def("timestep_attention_backward_cuda",
        [](const py::tuple& sizes, float scale, const py::tuple& inputs, Address timesteps, Address u, Address w,
           Address key_mask, int64_t table_rows, uint32_t drop_threshold, Address lse, bool rotary, const py::tuple& offsets,
           Address out, Address seed, bool seed_on_device, const py::tuple& grad_out, const py::tuple& grads, Address delta,
           int dtype, Address stream, int device) {
          TimestepAttentionArgs a = common_args(sizes, false, scale, inputs, timesteps, u, w, key_mask, table_rows,
                                                host_seed(seed, seed_on_device), drop_threshold, lse);
          a.rotary = rotary;
          set_offsets(a, offsets);
          a.out = pointer<void>(out);
          a.grad_out = head_tensor(grad_out);
          set_gradients(a, grads);
          a.grad_q_token = grads[8].cast<int64_t>();
          a.grad_k_token = grads[9].cast<int64_t>();
          py::gil_scoped_release release;
          check_cuda("timestep_attention_backward",
                     cuda::timestep_attention_backward(a, pointer<float>(delta), device_seed(seed, seed_on_device),
                                                       make_launch(dtype, stream, device)));
        });
}

}  // namespace pds
