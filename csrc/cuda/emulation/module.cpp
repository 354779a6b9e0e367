// The CUDA bindings on emulated kernels, which take addresses on the host; for the tests. See emulation.h.
#include "bindings/cuda/cuda.h"
#include "cuda/emulation/emulation.h"

namespace py = pybind11;
using pds::emulation::Order;

PYBIND11_MODULE(_C_emulation, m) {
  m.attr("has_cuda") = true;
  m.def("set_order", [](int order) { pds::emulation::set_order(static_cast<Order>(order)); });
  m.def("set_processors", &pds::emulation::set_processors);
  pds::bind_cuda(m);
}
