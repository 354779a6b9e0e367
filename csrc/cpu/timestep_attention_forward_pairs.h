// Forward of timestep attention in bfloat16 for heads with more than a few keys: see timestep_attention_pairs.h.
// With P the probabilities of the dropout's survivors, out^T = V^T P^T: the values are transposed once per head.
#pragma once
#include <limits>

#include "cpu/timestep_attention_pairs.h"

#if PDS_AMX
namespace pds {
namespace PDS_ISA {

constexpr int64_t kLinesPerPair = 6;   // fetched ahead while the softmax handles a pair of keys: enough at every length

class PairForward {
 public:
  explicit PairForward(const TimestepAttentionArgs& args) : a(args), s(args) {
    static thread_local Scratch scratch;
    const int64_t block = round_up(std::min(kQueryBlock, a.queries), kPanel);
    const int64_t keys_most = round_up(a.keys, AmxEngine::kRows);
    const int64_t pairs_most = round_up(a.keys, 2 * kPairStep) / 2;
    scratch.reserve(keys_most * (2 + s.score_depth + block) + pairs_most * (s.value_rows + 2 * s.depth + block) + block *
                    (s.depth + s.score_depth + s.value_rows) + 256);
    keys.index = reinterpret_cast<int32_t*>(scratch.take(a.keys));
    keys.bias = scratch.take(a.keys);
    keys.rows = take_pairs(scratch, keys_most * s.score_depth);
    scores = scratch.take(keys_most * block);
    values = take_pairs(scratch, pairs_most * s.value_rows);
    value_pairs = take_pairs(scratch, pairs_most * 2 * s.depth);
    probabilities = take_pairs(scratch, pairs_most * block);
    rows = take_pairs(scratch, block * s.depth);
    columns = take_pairs(scratch, block * s.score_depth);
    out = scratch.take(block * s.value_rows);
  }

  void gather(int64_t b, int64_t h) {
    gather_key_rows(a, s, b, h, keys);
    gather_values(b, h);
  }

  void attend(int64_t b, int64_t h, int64_t i0, Prefetch& ahead) {
    const int64_t n = std::min(kQueryBlock, a.queries - i0), lanes = round_up(n, kPanel), head = b * a.heads + h;
    gather_queries(a, s.depth, b, h, i0, n, lanes, rows);
    transpose_queries(s, rows, lanes, columns);
    for (int64_t j = 0; j < keys.count; j += AmxEngine::kRows)
      AmxEngine::product(s.score_depth, lanes / kPanel, {keys.rows + j * s.score_depth, s.score_depth, 1}, columns, kPanel,
                         lanes, {nullptr, 0}, scores + j * lanes, lanes);
    alignas(64) float inverse[kQueryBlock];
    for (int64_t l = 0; l < lanes; l += kWidth) {
      const auto run = a.drop_threshold ? &PairForward::softmax<true> : &PairForward::softmax<false>;
      const vfloat lse = (this->*run)(head, i0 + l, lanes, l, inverse + l, ahead);
      if (n > l) store_part(a.lse + head * a.queries + i0 + l, lse, static_cast<int>(std::min<int64_t>(kWidth, n - l)));
    }
    for (int64_t d = 0; d < s.value_rows; d += AmxEngine::kRows)
      AmxEngine::product(keys.depth, lanes / kPanel, {values + d * keys.depth, keys.depth, 1}, probabilities, kPanel,
                         lanes, {nullptr, 0}, out + d * lanes, lanes);
    write_rows(b, h, i0, n, lanes, inverse);
  }

 private:
  // values[d][p] holds features d of the keys 2p and 2p + 1, zero where there is none.
  void gather_values(int64_t b, int64_t h) {
    const int64_t padded = 2 * s.depth;
    for (int64_t p = 0; p < keys.depth; ++p) {
      for (int64_t d = 0; d < padded; d += 32) {
        __m512i pair[2];
        for (int i = 0; i < 2; ++i) {
          const int64_t at = 2 * p + i;
          pair[i] = at < keys.count ? read_value(b, h, keys.index[at], d) : _mm512_setzero_si512();
        }
        store_pairs(value_pairs + p * padded + d, zip(pair[0], pair[1], false));
        store_pairs(value_pairs + p * padded + d + 16, zip(pair[0], pair[1], true));
      }
    }
    transpose_units(value_pairs, keys.depth, padded, keys.depth, values);
  }

  __m512i read_value(int64_t b, int64_t h, int64_t j, int64_t d) const {
    return read_features(row_of<uint16_t>(a.v, b, j, h), a.dim, d, a.rotary ? tau_row<uint16_t>(a, b, j, h) : nullptr);
  }

  // Of kWidth queries from column l on: scores -> exp(score - largest), dropped ones 0, in pairs of keys; 1 / sum (times the
  // survivors' factor). Returns the log-sum-exp.
  template <bool kDropout>
  vfloat softmax(int64_t head, int64_t query, int64_t lanes, int64_t l, float* inverse, Prefetch& ahead) {
    const float* column = scores + l;
    const vfloat scale = splat(kLog2e * a.scale);
    const auto score = [&](int64_t j) { return scale * load(column + j * lanes) + splat(keys.bias[j]); };
    vfloat even = score(keys.count - 1), odd = even;   // two chains of maxima, for their latency
    for (int64_t j = 0; j + 1 < keys.count; j += 2) even = vmax(even, score(j)), odd = vmax(odd, score(j + 1));
    const vfloat top = vmax(even, odd);
    DropoutLanes dropout(a, head, query);
    vfloat total[2] = {};
    for (int64_t j = 0; j < 2 * keys.depth; j += 2) {
      vfloat p[2] = {};
      for (int i = 0; i < 2 && j + i < keys.count; ++i) {
        p[i] = rough_exp2_of_nonpositive(scale * load(column + (j + i) * lanes) + (splat(keys.bias[j + i]) - top));
        total[i] += p[i];
        if (kDropout) p[i] = select(dropout.keep(keys.index[j + i]), p[i], vfloat{});
      }
      ahead.fetch(kLinesPerPair);
      store_pairs(probabilities + j / 2 * lanes + l, round_and_zip(p[0], p[1]));
    }
    const vfloat sum = total[0] + total[1];
    store(inverse, splat(kDropout ? survivor_factor(a) : 1.f) / sum);
    return top * splat(1.f / kLog2e) + log_of_positive(sum);
  }

  void write_rows(int64_t b, int64_t h, int64_t i0, int64_t n, int64_t lanes, const float* inverse) {
    uint16_t* to = static_cast<uint16_t*>(a.out) + ((b * a.queries + i0) * a.heads + h) * a.dim;
    for (int64_t i = 0; i < n; i += 4)
      for (int64_t d = 0; d < a.dim; d += kWidth) {
        vfloat quad[4];
        transpose_quad(out + d * lanes + i, lanes, quad);
        for (int64_t c = 0; c < std::min<int64_t>(4, n - i); ++c)
          write_rounded(to + (i + c) * a.heads * a.dim + d, splat(inverse[i + c]) * quad[c], a.dim - d);
      }
  }

  const TimestepAttentionArgs& a;
  const PairSizes s;
  PairKeys keys;
  float *scores, *out;
  Bf16Pair *values, *value_pairs, *probabilities, *rows, *columns;
  [[maybe_unused]] const AmxEngine::Session session{};
};

}  // namespace PDS_ISA
}  // namespace pds
#endif
