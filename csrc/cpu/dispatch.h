// Run-time choice of the instruction set. Op files are compiled once per set, into pds::<isa>::; PDS_DISPATCH declares
// the copies of one function and defines pds::cpu::<function>, which calls the one that this processor runs.
#pragma once

namespace pds {

// amx runs the avx512_bf16 copies; where a kernel has an AMX path (csrc/cpu/gemm.h) it asks active_isa() for it.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

Isa active_isa();                 // the best one the processor has, unless set_isa lowered it
Isa detected_isa();
bool set_isa(const char* name);   // false: unknown, or above what the processor has
const char* isa_name(Isa isa);

}  // namespace pds

#if PDS_X86
#define PDS_DISPATCH(function, Args)                        \
  namespace baseline { void function(const Args&); }        \
  namespace avx2 { void function(const Args&); }            \
  namespace avx512 { void function(const Args&); }          \
  namespace avx512_bf16 { void function(const Args&); }     \
  namespace cpu {                                           \
  inline void function(const Args& args) {                  \
    switch (active_isa()) {                                 \
      case Isa::amx:                                        \
      case Isa::avx512_bf16: return avx512_bf16::function(args); \
      case Isa::avx512: return avx512::function(args);      \
      case Isa::avx2: return avx2::function(args);          \
      default: return baseline::function(args);             \
    }                                                       \
  }                                                         \
  }
#else
#define PDS_DISPATCH(function, Args)                        \
  namespace baseline { void function(const Args&); }        \
  namespace cpu {                                           \
  inline void function(const Args& args) { baseline::function(args); } \
  }
#endif
