#include <algorithm>
#include <string>

#include "bindings/timestep_attention.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace pds {
namespace {

void check_timesteps(const TimestepAttentionArgs& a) {
  const int64_t tokens = a.key_offsets ? a.key_offsets[a.batch] : a.batch * a.keys;
  for (int64_t n = 0; a.timesteps && n < tokens; ++n)
    if (a.timesteps[n] < 0 || a.timesteps[n] >= a.table_rows)
      throw py::value_error("timesteps must be in 0.." + std::to_string(a.table_rows - 1) + " (rows of tau), got " +
                            std::to_string(a.timesteps[n]));
}

template <typename T>
void advance(T*& p, int64_t elements) {
  if (p) p += elements;
}

// Sentence b of packed ones.
TimestepAttentionArgs sentence(TimestepAttentionArgs a, int64_t b) {
  const int64_t query = a.query_offsets[b], key = a.key_offsets[b], size = a.bf16 ? 2 : 4, row = a.heads * a.dim;
  const auto advance_bytes = [&](auto& p, int64_t elements) {
    if (p) p = const_cast<char*>(static_cast<const char*>(p)) + elements * size;
  };
  a.queries = a.query_offsets[b + 1] - query, a.keys = a.key_offsets[b + 1] - key;
  a.batch = 1, a.first_head = b * a.heads;
  for (HeadTensor* t : {&a.q, &a.grad_out}) advance_bytes(t->data, query * t->token);
  for (HeadTensor* t : {&a.k, &a.v}) advance_bytes(t->data, key * t->token);
  if (a.timesteps) a.timesteps += key;
  else advance_bytes(a.tau.data, key * a.tau.token);
  advance_bytes(a.out, query * row);
  advance(a.lse, query * a.heads);
  advance_bytes(a.grad_q, query * a.grad_q_token);
  for (void** p : {&a.grad_k, &a.grad_v}) advance_bytes(*p, key * a.grad_k_token);
  advance_bytes(a.grad_tau, key * row);
  advance(a.grad_tau_rows, key * row);
  for (float** p : {&a.grad_u, &a.grad_w}) advance(*p, b * row);
  a.query_offsets = a.key_offsets = nullptr;
  return a;
}

template <typename Kernel>
void run(const TimestepAttentionArgs& a, Kernel kernel) {
  check_timesteps(a);
  py::gil_scoped_release release;
  if (!a.query_offsets) return kernel(a);
  if (a.batch < 2 * num_threads()) {   // then the heads of a sentence are shared out
    for (int64_t b = 0; b < a.batch; ++b) kernel(sentence(a, b));
  } else {
    parallel_for(a.batch, [&](int64_t b) { kernel(sentence(a, b)); });
  }
}

// (first, last, least and most tokens of a sentence) of `count` offsets.
py::tuple offsets_range(Address address, int64_t count) {
  const int64_t* offsets = pointer<const int64_t>(address);
  int64_t least = count > 1 ? offsets[1] - offsets[0] : 0, most = least;
  for (int64_t b = 1; b + 1 < count; ++b) {
    const int64_t length = offsets[b + 1] - offsets[b];
    least = std::min(least, length), most = std::max(most, length);
  }
  return py::make_tuple(offsets[0], offsets[count - 1], least, most);
}

}  // namespace

void bind_timestep_attention(py::module_& m) {
  m.def("offsets_range", &offsets_range);
  m.def("timestep_attention_forward",
        [](const py::tuple& sizes, bool bf16, float scale, const py::tuple& inputs, Address timesteps, Address u, Address w,
           Address key_mask, int64_t table_rows, uint64_t seed, uint32_t drop_threshold, Address lse, bool rotary,
           const py::tuple& offsets, Address out) {
          TimestepAttentionArgs a =
              common_args(sizes, bf16, scale, inputs, timesteps, u, w, key_mask, table_rows, seed, drop_threshold, lse);
          a.rotary = rotary;
          set_offsets(a, offsets);
          a.out = pointer<void>(out);
          run(a, cpu::timestep_attention_forward);
        });
  // grads as in set_gradients, then the elements between tokens in the gradients of q, and of k and v, sum_u and sum_w
  m.def("timestep_attention_backward",
        [](const py::tuple& sizes, bool bf16, float scale, const py::tuple& inputs, Address timesteps, Address u, Address w,
           Address key_mask, int64_t table_rows, uint64_t seed, uint32_t drop_threshold, Address lse, bool rotary,
           const py::tuple& offsets, const py::tuple& grad_out, const py::tuple& grads) {
          TimestepAttentionArgs a =
              common_args(sizes, bf16, scale, inputs, timesteps, u, w, key_mask, table_rows, seed, drop_threshold, lse);
          a.rotary = rotary;
          set_offsets(a, offsets);
          a.grad_out = head_tensor(grad_out);
          set_gradients(a, grads);
          a.grad_q_token = grads[8].cast<int64_t>();
          a.grad_k_token = grads[9].cast<int64_t>();
          a.sum_u = pointer<void>(grads[10].cast<Address>());
          a.sum_w = pointer<void>(grads[11].cast<Address>());
          run(a, cpu::timestep_attention_backward);
          cpu::timestep_attention_sum_biases(a);
        });
}

}  // namespace pds
