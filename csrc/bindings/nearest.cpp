#include "common/nearest.h"

#include "bindings/module.h"

namespace py = pybind11;

namespace pds {
namespace {

int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// (32-bit words of the panels, floats of the rest) that a packed table takes.
py::tuple packed_sizes(int64_t vocab, int64_t dim) {
  const int64_t rows = padded(vocab, kNearestColumns), features = padded(dim, kNearestFeatures);
  return py::make_tuple(rows * features, rows + 2 * (rows / kNearestColumns) + features);
}

NearestArgs arguments(Address table, Address bias, bool bf16, bool dot, int64_t vocab, int64_t dim, Address panels,
                      Address rest, Address wild) {
  NearestArgs args{};
  args.table = pointer<void>(table);
  args.bias = pointer<void>(bias);
  args.bf16 = bf16, args.dot = dot, args.vocab = vocab, args.dim = dim;
  const int64_t rows = padded(vocab, kNearestColumns), groups = rows / kNearestColumns;
  float* floats = pointer<float>(rest);
  args.packed = {groups, kNearestColumns, padded(dim, kNearestFeatures), pointer<uint32_t>(panels), floats,
                 floats + rows, floats + rows + groups, floats + rows + 2 * groups, pointer<int32_t>(wild)};
  return args;
}

}  // namespace

void bind_nearest(py::module_& m) {
  m.def("nearest_packed_sizes", &packed_sizes);
  m.def("nearest_pack", [](Address table, Address bias, bool bf16, bool dot, int64_t vocab, int64_t dim, Address panels,
                           Address rest, Address wild) {
    py::gil_scoped_release release;
    cpu::nearest_pack(arguments(table, bias, bf16, dot, vocab, dim, panels, rest, wild));
  });
  m.def("nearest_search", [](Address x, int64_t rows, Address table, Address bias, bool bf16, bool dot, int64_t vocab,
                             int64_t dim, Address panels, Address rest, Address wild, Address ids, Address embeddings) {
    py::gil_scoped_release release;
    NearestArgs args = arguments(table, bias, bf16, dot, vocab, dim, panels, rest, wild);
    args.x = pointer<void>(x);
    args.rows = rows;
    args.k = 1;
    args.ids = pointer<int64_t>(ids);
    args.embeddings = pointer<void>(embeddings);
    cpu::nearest_search(args);
  });
  m.attr("nearest_most") = kNearestMost;
  m.def("nearest_topk", [](Address x, int64_t rows, Address table, Address bias, bool bf16, bool dot, int64_t vocab, int64_t dim,
                           Address panels, Address rest, Address wild, int64_t k, Address ids, Address scores) {
    py::gil_scoped_release release;
    NearestArgs args = arguments(table, bias, bf16, dot, vocab, dim, panels, rest, wild);
    args.x = pointer<void>(x);
    args.rows = rows;
    args.k = k;
    args.ids = pointer<int64_t>(ids);
    args.scores = pointer<double>(scores);
    cpu::nearest_search(args);
  });
}

}  // namespace pds
