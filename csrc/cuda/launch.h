// What every CUDA launcher shares with its binding. No CUDA header: the bindings are compiled by the host compiler.
#pragma once
#include <cstdint>

namespace pds {
namespace cuda {

enum class FloatType : int { float32 = 0, bfloat16 = 1, float16 = 2 };   // the codes of pydiffseq/ops/_cuda.py

struct Launch {
  void* stream;    // cudaStream_t
  int device;
  FloatType dtype;
};

using Status = int;   // cudaError_t
const char* error_string(Status status);

}  // namespace cuda
}  // namespace pds
