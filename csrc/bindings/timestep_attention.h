// How timestep attention's arguments come from Python, on the CPU and on CUDA.
#pragma once
#include "bindings/module.h"
#include "common/timestep_attention.h"

namespace pds {

// (address, batch stride, token stride, head stride)
inline HeadTensor head_tensor(const pybind11::tuple& t) {
  HeadTensor out;
  out.data = pointer<const void>(t[0].cast<Address>());
  out.batch = t[1].cast<int64_t>();
  out.token = t[2].cast<int64_t>();
  out.head = t[3].cast<int64_t>();
  return out;
}

// inputs = (q, k, v, tau) as in head_tensor; sizes = (batch, heads, queries, keys, dim).
inline TimestepAttentionArgs common_args(const pybind11::tuple& sizes, bool bf16, float scale, const pybind11::tuple& inputs,
                                         Address timesteps, Address u, Address w, Address key_mask, int64_t table_rows,
                                         uint64_t seed, uint32_t drop_threshold, Address lse) {
  TimestepAttentionArgs a{};
  a.batch = sizes[0].cast<int64_t>();
  a.heads = sizes[1].cast<int64_t>();
  a.queries = sizes[2].cast<int64_t>();
  a.keys = sizes[3].cast<int64_t>();
  a.dim = sizes[4].cast<int64_t>();
  a.bf16 = bf16;
  a.scale = scale;
  a.q = head_tensor(inputs[0].cast<pybind11::tuple>());
  a.k = head_tensor(inputs[1].cast<pybind11::tuple>());
  a.v = head_tensor(inputs[2].cast<pybind11::tuple>());
  a.tau = head_tensor(inputs[3].cast<pybind11::tuple>());
  a.timesteps = pointer<const int64_t>(timesteps);
  a.u = pointer<const void>(u);
  a.w = pointer<const void>(w);
  a.key_mask = pointer<const uint8_t>(key_mask);
  a.table_rows = table_rows;
  a.seed = seed;
  a.drop_threshold = drop_threshold;
  a.lse = pointer<float>(lse);
  return a;
}

// Addresses of the offsets of packed sentences' queries and keys, or 0.
inline void set_offsets(TimestepAttentionArgs& a, const pybind11::tuple& offsets) {
  a.query_offsets = pointer<const int64_t>(offsets[0].cast<Address>());
  a.key_offsets = pointer<const int64_t>(offsets[1].cast<Address>());
}

// grads = (q, k, v, tau, tau rows, table, u, w), 0 where not wanted
inline void set_gradients(TimestepAttentionArgs& a, const pybind11::tuple& grads) {
  const auto address = [&](int i) { return grads[i].cast<Address>(); };
  a.grad_q = pointer<void>(address(0));
  a.grad_k = pointer<void>(address(1));
  a.grad_v = pointer<void>(address(2));
  a.grad_tau = pointer<void>(address(3));
  a.grad_tau_rows = pointer<float>(address(4));
  a.grad_table = pointer<float>(address(5));
  a.grad_u = pointer<float>(address(6));
  a.grad_w = pointer<float>(address(7));
}

}  // namespace pds
