#include "bindings/module.h"

namespace pds {

void bind_noise(pybind11::module_&) {}

}  // namespace pds
