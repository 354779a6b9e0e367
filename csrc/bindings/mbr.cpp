#include "common/mbr.h"

#include <array>
#include <stdexcept>
#include <string>

#include "bindings/module.h"

namespace py = pybind11;

namespace pds {
namespace {

template <typename Enum, size_t N>
Enum named(const std::string& name, const std::array<const char*, N>& names) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return static_cast<Enum>(i);
  throw std::invalid_argument("unknown name " + name);
}

void utilities(Address tokens, Address offsets, int64_t count, int64_t distinct, const std::string& metric,
               const std::string& smoothing, Address utility) {
  const MbrArgs args{pointer<const int64_t>(tokens), pointer<const int64_t>(offsets), count, distinct,
                     named<Utility>(metric, std::array{"bleu", "chrf", "f1", "edit"}),
                     named<BleuSmoothing>(smoothing, std::array{"add1", "add1_all", "method4", "exp"}),
                     pointer<double>(utility)};
  cpu::mbr_utilities(args);
}

}  // namespace

void bind_mbr(py::module_& m) { m.def("mbr_utilities", &utilities, py::call_guard<py::gil_scoped_release>()); }

}  // namespace pds
