#include "cuda/cross_entropy.h"

#include "bindings/cuda/cuda.h"

namespace py = pybind11;

namespace pds {
namespace {

Address address(const py::tuple& from, int i) { return from[i].cast<Address>(); }

// inputs = (x, table, bias, target), sizes = (rows, vocab, dim, stride), rows_out = (losses, lse); see cuda/cross_entropy.h.
cuda::CrossEntropyCudaArgs common(const py::tuple& inputs, const py::tuple& sizes, int64_t ignore_index, float smoothing,
                                  const py::tuple& rows_out) {
  cuda::CrossEntropyCudaArgs args{};
  args.x = pointer<void>(address(inputs, 0)), args.table = pointer<void>(address(inputs, 1));
  args.bias = pointer<float>(address(inputs, 2));
  args.target = pointer<int64_t>(address(inputs, 3));
  args.rows = sizes[0].cast<int64_t>(), args.vocab = sizes[1].cast<int64_t>();
  args.dim = sizes[2].cast<int64_t>(), args.stride = sizes[3].cast<int64_t>();
  args.ignore_index = ignore_index;
  args.uniform = smoothing / static_cast<float>(args.vocab), args.keep = 1.f - smoothing;
  args.losses = pointer<float>(address(rows_out, 0)), args.lse = pointer<float>(address(rows_out, 1));
  return args;
}

// workspace = (sums, at_target).
void forward(const py::tuple& inputs, const py::tuple& sizes, int64_t ignore_index, float smoothing, const py::tuple& rows_out,
             const py::tuple& workspace, int64_t parts, int dtype, Address stream, int device) {
  cuda::CrossEntropyCudaArgs args = common(inputs, sizes, ignore_index, smoothing, rows_out);
  args.sums = pointer<cuda::LogSum>(address(workspace, 0));
  args.at_target = pointer<float>(address(workspace, 1));
  args.parts = parts;
  py::gil_scoped_release release;
  check_cuda("linear_cross_entropy", cuda::cross_entropy_forward(args, make_launch(dtype, stream, device)));
}

// workspace = (samples, largest, partial, partial_bias), grads = (x, table, bias), parts = (of x, of the table).
void backward(Address grad, const py::tuple& inputs, const py::tuple& sizes, int64_t ignore_index, float smoothing,
              const py::tuple& rows_out, const py::tuple& workspace, const py::tuple& parts, const py::tuple& grads, int dtype,
              Address stream, int device) {
  cuda::CrossEntropyCudaArgs args = common(inputs, sizes, ignore_index, smoothing, rows_out);
  args.grad = pointer<float>(grad);
  args.samples = pointer<cuda::SampleRow>(address(workspace, 0));
  args.largest = pointer<float>(address(workspace, 1));
  args.partial = pointer<float>(address(workspace, 2));
  args.partial_bias = pointer<float>(address(workspace, 3));
  args.parts_x = parts[0].cast<int64_t>(), args.parts_table = parts[1].cast<int64_t>();
  args.grad_x = pointer<void>(address(grads, 0)), args.grad_table = pointer<void>(address(grads, 1));
  args.grad_bias = pointer<void>(address(grads, 2));
  py::gil_scoped_release release;
  check_cuda("linear_cross_entropy_backward", cuda::cross_entropy_backward(args, make_launch(dtype, stream, device)));
}

}  // namespace

void bind_cross_entropy_cuda(py::module_& m) {
  m.def("cross_entropy_forward_cuda", &forward);
  m.def("cross_entropy_backward_cuda", &backward);
}

}  // namespace pds
