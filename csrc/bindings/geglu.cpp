#include "common/geglu.h"

#include "bindings/module.h"

namespace py = pybind11;

namespace pds {
namespace {

using Kernel = void (*)(const GegluArgs&);

template <Kernel kernel>
void run(Address grad, Address x, Address out, int64_t rows, int64_t columns, bool bf16) {
  kernel(GegluArgs{pointer<const void>(grad), pointer<const void>(x), pointer<void>(out), rows, columns, bf16});
}

}  // namespace

void bind_geglu(py::module_& m) {
  m.def("geglu", &run<cpu::geglu>, py::call_guard<py::gil_scoped_release>());
  m.def("geglu_backward", &run<cpu::geglu_backward>, py::call_guard<py::gil_scoped_release>());
}

}  // namespace pds
