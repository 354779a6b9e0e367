// How the timesteps of the noise ops come from Python, on the CPU and on CUDA.
#pragma once
#include <tuple>

#include "bindings/module.h"
#include "common/token_times.h"

namespace pds {

using Times = std::tuple<Address, Address, double, bool>;   // (t, lengths or 0, anchor scale, whether t is [B, N])

inline TokenTimes token_times(const Times& times) {
  return {pointer<const int64_t>(std::get<0>(times)), pointer<const int64_t>(std::get<1>(times)), std::get<2>(times),
          std::get<3>(times)};
}

}  // namespace pds
