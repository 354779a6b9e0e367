#include "cuda/geglu.h"

#include "bindings/cuda/cuda.h"

namespace py = pybind11;

namespace pds {
namespace {

using Kernel = cuda::Status (*)(const GegluArgs&, const cuda::Launch&);

template <Kernel kernel>
void run(Address grad, Address x, Address out, int64_t rows, int64_t columns, int dtype, Address stream, int device) {
  check_cuda("geglu", kernel(GegluArgs{pointer<const void>(grad), pointer<const void>(x), pointer<void>(out), rows, columns, false},
                             make_launch(dtype, stream, device)));
}

}  // namespace

void bind_geglu_cuda(py::module_& m) {
  m.def("geglu_cuda", &run<cuda::geglu>, py::call_guard<py::gil_scoped_release>());
  m.def("geglu_backward_cuda", &run<cuda::geglu_backward>, py::call_guard<py::gil_scoped_release>());
}

}  // namespace pds
