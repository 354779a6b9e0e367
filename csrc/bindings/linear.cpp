#include "common/linear.h"

#include "bindings/module.h"

namespace py = pybind11;

namespace pds {
namespace {

void pack(Address weight, Address bias, Address packed, int64_t columns, int64_t depth, bool bf16, bool geglu) {
  cpu::linear_pack(LinearArgs{nullptr, pointer<const void>(weight), pointer<const void>(bias), nullptr, nullptr,
                              pointer<uint32_t>(packed), 0, columns, depth, bf16, geglu});
}

void run(Address x, Address packed, Address residual, Address out, int64_t rows, int64_t columns, int64_t depth, bool bf16,
         bool geglu) {
  cpu::linear(LinearArgs{pointer<const void>(x), nullptr, nullptr, pointer<const void>(residual), pointer<void>(out),
                         pointer<uint32_t>(packed), rows, columns, depth, bf16, geglu});
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_packed_words", &linear_packed_words);
  m.def("linear_pack", &pack, py::call_guard<py::gil_scoped_release>());
  m.def("linear", &run, py::call_guard<py::gil_scoped_release>());
}

}  // namespace pds
