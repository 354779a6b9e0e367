#include "common/cross_entropy.h"

#include "bindings/module.h"

namespace py = pybind11;

namespace pds {

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy_forward",
        [](Address x, Address table, Address bias, Address target, bool bf16, int64_t rows, int64_t dim, int64_t vocab,
           int64_t ignore_index, float smoothing, Address losses, Address lse) {
          py::gil_scoped_release release;
          CrossEntropyArgs args{};
          args.x = pointer<void>(x);
          args.table = pointer<void>(table);
          args.bias = pointer<void>(bias);
          args.target = pointer<int64_t>(target);
          args.bf16 = bf16;
          args.rows = rows, args.dim = dim, args.vocab = vocab, args.ignore_index = ignore_index;
          args.smoothing = smoothing;
          args.losses = pointer<float>(losses);
          args.lse = pointer<float>(lse);
          cpu::cross_entropy_forward(args);
        });
  m.def("cross_entropy_backward",
        [](Address x, Address table, Address bias, Address target, bool bf16, int64_t rows, int64_t dim, int64_t vocab,
           int64_t ignore_index, float smoothing, Address lse, Address grad, Address grad_x, Address grad_table,
           Address grad_bias) {
          py::gil_scoped_release release;
          CrossEntropyArgs args{};
          args.x = pointer<void>(x);
          args.table = pointer<void>(table);
          args.bias = pointer<void>(bias);
          args.target = pointer<int64_t>(target);
          args.bf16 = bf16;
          args.rows = rows, args.dim = dim, args.vocab = vocab, args.ignore_index = ignore_index;
          args.smoothing = smoothing;
          args.lse = pointer<float>(lse);
          args.grad = pointer<float>(grad);
          args.grad_x = pointer<void>(grad_x);
          args.grad_table = pointer<void>(grad_table);
          args.grad_bias = pointer<void>(grad_bias);
          cpu::cross_entropy_backward(args);
        });
}

}  // namespace pds
