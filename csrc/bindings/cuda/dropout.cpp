#include "cuda/dropout.h"

#include "bindings/cuda/cuda.h"
#include "bindings/dropout.h"

namespace py = pybind11;

namespace pds {

void bind_dropout_cuda(py::module_& m) {
  m.def("dropout_cuda", [](Address x, Address residual, Address out, int64_t n, Address seed, uint32_t threshold, int dtype,
                           bool seed_on_device, Address stream, int device) {
    const DropoutArgs args = dropout_args(x, residual, out, n, host_seed(seed, seed_on_device), threshold, false);
    check_cuda("dropout", cuda::dropout(args, device_seed(seed, seed_on_device), make_launch(dtype, stream, device)));
  }, py::call_guard<py::gil_scoped_release>());
}

}  // namespace pds
