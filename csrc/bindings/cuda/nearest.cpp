#include "cuda/nearest.h"

#include "bindings/cuda/cuda.h"

namespace py = pybind11;

namespace pds {
namespace {

int64_t parts(int64_t rows, int64_t tiles, int device) {
  const int64_t count = cuda::tile_parts(rows, tiles, device);
  if (count < 0) check_cuda("tile_parts", static_cast<cuda::Status>(-count));
  return count;
}

// packed = (rows, bias, norm, slack, centre, wild), workspace = (rows16, margins, slots), out = (ids, embeddings, scores);
// see cuda/nearest.h.
void search(Address x, int64_t rows, Address table, Address bias, bool dot, int64_t vocab, int64_t dim,
            const py::tuple& packed, int64_t tiles, int64_t padded, const py::tuple& workspace, int64_t table_parts, int64_t k,
            const py::tuple& out, int dtype, Address stream, int device) {
  const auto address = [](const py::tuple& from, int i) { return from[i].cast<Address>(); };
  cuda::NearestCudaArgs args{};
  args.x = pointer<void>(x), args.table = pointer<void>(table), args.bias = pointer<void>(bias);
  args.dot = dot, args.rows = rows, args.vocab = vocab, args.dim = dim;
  args.packed = pointer<void>(address(packed, 0));
  args.packed_bias = pointer<float>(address(packed, 1));
  args.norm = pointer<float>(address(packed, 2));
  args.slack = pointer<float>(address(packed, 3));
  args.centre = pointer<float>(address(packed, 4));
  args.wild = pointer<int32_t>(address(packed, 5));
  args.tiles = tiles, args.padded = padded, args.parts = table_parts;
  args.rows16 = pointer<void>(address(workspace, 0));
  args.margins = pointer<float>(address(workspace, 1));
  args.slots = pointer<cuda::NearestSlot>(address(workspace, 2));
  args.k = k;
  args.ids = pointer<int64_t>(address(out, 0)), args.embeddings = pointer<void>(address(out, 1));
  args.scores = pointer<float>(address(out, 2));
  py::gil_scoped_release release;
  check_cuda("nearest", cuda::nearest_search(args, make_launch(dtype, stream, device)));
}

}  // namespace

void bind_nearest_cuda(py::module_& m) {
  m.def("tile_parts_cuda", &parts);
  m.def("nearest_search_cuda", &search);
}

}  // namespace pds
