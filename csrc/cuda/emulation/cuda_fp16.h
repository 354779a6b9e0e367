// Stands in for CUDA's header of this name.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return (x.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {   // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7FFF};
  if (magnitude == 0.f) return {sign};
  if (magnitude >= 65520.f) return {static_cast<uint16_t>(sign | 0x7C00)};
  int exponent;
  std::frexp(magnitude, &exponent);                       // magnitude = f 2^exponent, f in [1/2, 1)
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;   // of the last place
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // Steps of 2^-24 are the subnormal encoding; above, each power of two adds 1024 to it.
  return {static_cast<uint16_t>(sign | (steps + (unit + 24) * 1024))};
}
