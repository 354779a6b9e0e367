#include "bindings/module.h"

namespace pds {

void bind_timestep_attention(pybind11::module_&) {}

}  // namespace pds
