#include "cpu/dispatch.h"

#include <atomic>
#include <cstring>

namespace pds {
namespace {

Isa detect() {
#if PDS_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{static_cast<int>(detect())};
  return isa;
}

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool set_isa(const char* name) {
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      chosen().store(i);
      return true;
    }
  }
  return false;
}

}  // namespace pds
