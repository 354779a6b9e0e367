// pydiffseq._C: raw pointers and sizes in, nothing allocated here. Each op has a binding file of its own.
#include "bindings/module.h"

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#if PDS_CUDA
#include "bindings/cuda/cuda.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of pydiffseq on raw pointers; use pydiffseq.ops instead.";
  m.def("isa", [] { return pds::isa_name(pds::active_isa()); });
  m.def("detected_isa", [] { return pds::isa_name(pds::detected_isa()); });
  m.def("set_isa", &pds::set_isa);
  m.def("set_num_threads", &pds::set_num_threads);
  m.def("num_threads", &pds::num_threads);
  m.def("use_openmp_library", &pds::use_openmp_library);
  m.def("use_huge_pages", [](uintptr_t data, int64_t bytes) { pds::use_huge_pages(reinterpret_cast<void*>(data), bytes); });
  m.attr("has_cuda") = bool(PDS_CUDA);
  pds::bind_noise(m);
  pds::bind_dropout(m);
  pds::bind_nearest(m);
  pds::bind_cross_entropy(m);
  pds::bind_timestep_attention(m);
  pds::bind_geglu(m);
  pds::bind_linear(m);
  pds::bind_mbr(m);
#if PDS_CUDA
  pds::bind_cuda(m);
#endif
}
