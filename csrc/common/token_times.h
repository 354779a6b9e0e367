// Timesteps of tokens: given, or made from one index per sentence as diffusion/token_times.py makes them, step by step in
// float32, so that rounding half to even gives the same integers.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/philox.h"

namespace pds {

// The timestep of token n of a sentence of `length` tokens at index s (AR-Diffusion, Wu et al. 2023, equation 4); -1: s lies
// outside 0 .. T + length - 1.
PDS_HD int64_t xy_timestep(int64_t s, int64_t length, int64_t n, int64_t T, double anchor_scale) {
  if (s < 0 || s >= T + length) return -1;
  const int64_t last = length - 1, start_n = s < last ? last - s : 0;
  const int64_t start_t = s < last ? 0 : s - last < T ? s - last : T - 1;
  int64_t anchor_n = static_cast<int64_t>(floor(static_cast<double>(length) * anchor_scale));
  if (anchor_n <= start_n) anchor_n = start_n + 1;
  const float x = exact_div(exact_add(static_cast<float>(n), -static_cast<float>(anchor_n)),
                            static_cast<float>(start_n - anchor_n));
  const float most = static_cast<float>(T - 1);
  const float t = rintf(exact_add(exact_mul(x, static_cast<float>(start_t - (T - 1))), most));
  return static_cast<int64_t>(t < 0.f ? 0.f : t > most ? most : t);
}

struct TokenTimes {
  const int64_t* t;         // [B, N], or [B] where per_token is false
  const int64_t* lengths;   // [B] or null; if given, t is the sentences' index s, [B]
  double anchor_scale;      // only with lengths
  bool per_token;

  PDS_HD int64_t at(int64_t token, int64_t sentence, int64_t n, int64_t T) const {
    const int64_t value = t[per_token ? token : sentence];
    return lengths == nullptr ? value : xy_timestep(value, lengths[sentence], n, T, anchor_scale);
  }
};

}  // namespace pds
