#include "bindings/dropout.h"

namespace py = pybind11;

namespace pds {
namespace {

void run_dropout(Address x, Address residual, Address out, int64_t n, Address seed, uint32_t threshold, bool bf16) {
  cpu::dropout(dropout_args(x, residual, out, n, static_cast<uint64_t>(*pointer<const int64_t>(seed)), threshold, bf16));
}

}  // namespace

void bind_dropout(py::module_& m) { m.def("dropout", &run_dropout, py::call_guard<py::gil_scoped_release>()); }

}  // namespace pds
