#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace pds {

using Address = uintptr_t;   // a tensor's data_ptr(); 0 stands for "absent"

template <typename T>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

void bind_noise(pybind11::module_& m);
void bind_dropout(pybind11::module_& m);
void bind_nearest(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_timestep_attention(pybind11::module_& m);
void bind_geglu(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_mbr(pybind11::module_& m);

}  // namespace pds
