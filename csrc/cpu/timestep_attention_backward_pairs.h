// Backward of timestep attention on AMX tiles, in bfloat16; the formulas are in timestep_attention_backward.cpp, the packing
// of operands in timestep_attention_pairs.h.
//
// Scores are [key][query], so that the vector lanes run over queries and sums over keys need no reductions. Probabilities
// and the scores' gradients are then the left sides of dV and dK' as they are computed. With neighbouring keys zipped, the
// latter are also the right side of the transposed dQ. A strip of 32 queries passes over the keys twice, for the sums and
// for the gradients; four strips at a time are multiplied into the gradients of the keys.
#pragma once
#include "cpu/timestep_attention_gradients.h"
#include "cpu/timestep_attention_pairs.h"

#if PDS_AMX
namespace pds {
namespace PDS_ISA {

class PairBackward {
  using T = uint16_t;
  using Form = PairForm<T>;
  static constexpr int64_t kBlock = Form::kBlock;
  static constexpr int64_t kStrips = 4;   // strips of queries that are multiplied into dK' and dV together

 public:
  static constexpr int64_t kFewestKeys = Form::kFewestKeys;

  explicit PairBackward(const TimestepAttentionArgs& args)
      : a(args), s(args, kChunk), blocks(s.padded / kChunk) {
    static thread_local Scratch scratch;
    const int64_t most = round_up(a.keys, kPanel), all = most / kPanel;
    scratch.reserve(2 * most + HeadSums::floats(a, s) + 3 * all * (blocks + kStrips) * kBlock +
                    (3 + 2 * kStrips) * blocks * kBlock + kStrip * 2 * s.padded + most * 3 * kStrip + 1024);
    keys.index = reinterpret_cast<int32_t*>(scratch.take(most));
    keys.bias = scratch.take(most);
    sums.take(scratch, a, s);
    key_rows = take_pairs(scratch, all * blocks * kBlock);
    value_rows = take_pairs(scratch, all * blocks * kBlock);
    key_columns = take_pairs(scratch, all * blocks * kBlock);
    probabilities = take_pairs(scratch, all * kStrips * kBlock);
    score_grads = take_pairs(scratch, all * kStrips * kBlock);
    zipped = take_pairs(scratch, all * kStrips * kBlock);
    packed = take_pairs(scratch, blocks * kBlock);
    query_columns = take_pairs(scratch, blocks * kBlock);
    grad_columns = take_pairs(scratch, blocks * kBlock);
    queries = take_pairs(scratch, kStrips * blocks * kBlock);
    grads = take_pairs(scratch, kStrips * blocks * kBlock);
    rows = scratch.take(kStrip * s.padded);
    turned = scratch.take(kStrip * s.padded);
    scores = scratch.take(most * kStrip);
    products = scratch.take(most * kStrip);
    dropped = a.drop_threshold ? scratch.take(most * kStrip) : scores;
  }

  void differentiate(int64_t b, int64_t h) {
    gather(b, h);
    plan_fetches(b, h);
    sums.clear(a, s, panels * kPanel);
    const auto softmax = a.drop_threshold ? &PairBackward::softmax<true> : &PairBackward::softmax<false>;
    for (int64_t i0 = 0; i0 < a.queries; i0 += kStrips * kStrip) {
      const int64_t strips = std::min(kStrips, (a.queries - i0 + kStrip - 1) / kStrip);
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t first = i0 + strip * kStrip, n = std::min(kStrip, a.queries - first);
        start_strip(b, h, first, n, strip);
        (this->*softmax)(b * a.heads + h, first, n, strip);
        multiply_into_queries(b, h, first, n, strip);
      }
      multiply_into_keys(probabilities, grads, strips, i0 > 0, sums.value);
      multiply_into_keys(score_grads, queries, strips, i0 > 0, sums.key);
    }
    finish_head<T>(a, s, keys, sums, b, h);
  }

 private:
  Row<T> row(const HeadTensor& t, int64_t b, int64_t i, int64_t h) const {
    return {row_of<T>(t, b, i, h), a.rotary ? tau_row<T>(a, b, i, h) : nullptr};
  }

  // What this head writes, and what the next one reads.
  void plan_fetches(int64_t b, int64_t h) {
    ahead.clear();
    if (!streams_gradients(a)) {
      fetch_query_gradients<T>(ahead, a, b, h, 0, a.queries);
      fetch_key_gradients<T>(ahead, a, b, h);
    }
    if (++h == a.heads) h = 0, ++b;
    if (b == a.batch) return;
    fetch_keys<T>(ahead, a, b, h, 0, a.keys);
    for (const HeadTensor& t : {a.q, a.grad_out}) fetch_rows<T>(ahead, t, b, h, 0, a.queries, a.dim);
  }

  // ---- keys and values ----

  void gather(int64_t b, int64_t h) {
    select_keys(a, b, keys);
    panels = round_up(keys.count, kPanel) / kPanel;
    for (int64_t p = 0; p < panels; ++p) gather_panel(b, h, p);
  }

  void gather_panel(int64_t b, int64_t h, int64_t p) {
    const T *u = head_row<T>(a.u, h, a.dim), *w = head_row<T>(a.w, h, a.dim);
    alignas(64) float terms[kPanel * kWidth];
    Row<T> summed[kPanel];   // k + tau, or the turned k; zeros where there is no key
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t at = p * kPanel + i;
      const bool there = at < keys.count;
      const int64_t j = there ? keys.index[at] : 0;
      const Row<T> key = there ? row(a.k, b, j, h) : Row<T>{};
      const T* tau = there && a.tau.data && !a.rotary ? tau_row<T>(a, b, j, h) : nullptr;
      store(terms + i * kWidth, there ? Form::gather_key(key, tau, u, w, a.dim, s.padded, rows + i * s.padded)
                                      : splat(-std::numeric_limits<float>::infinity()));
      summed[i] = {there ? reinterpret_cast<const T*>(rows + i * s.padded) : nullptr, nullptr};
      Form::pack_query(summed[i], s.padded, s.padded, i, key_rows + p * blocks * kBlock);
      Form::pack_query(there ? row(a.v, b, j, h) : Row<T>{}, a.dim, s.padded, i, value_rows + p * blocks * kBlock);
    }
    for (int64_t i = 0; i < kPanel; i += kWidth)
      store(keys.bias + p * kPanel + i, splat(a.scale * kLog2e) * fold_rows(terms + i * kWidth, add));
    pack_columns_of_rows(summed, key_columns + p * kBlock);
  }

  // 32 rows -> [blocks of 32 features], each [32 features][16 pairs of rows] and `panels` blocks from the next.
  void pack_columns_of_rows(const Row<T>* from, Bf16Pair* out) {
    Form::pack_values(from, s.padded, s.padded, packed);
    for (int64_t d = 0; d < blocks; ++d)
      for (int64_t f = 0; f < kChunk; f += 4) {
        vfloat quad[4];
        transpose_quad(reinterpret_cast<const float*>(packed + d * kBlock + f), kPanel, quad);
        for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + d * panels * kBlock + (f + c) * kWidth, (__m512i)quad[c]);
      }
  }

  // ---- queries ----

  void start_strip(int64_t b, int64_t h, int64_t i0, int64_t n, int64_t strip) {
    Row<T> query[kStrip] = {}, grad[kStrip] = {};
    for (int64_t i = 0; i < n; ++i) query[i] = row(a.q, b, i0 + i, h), grad[i] = {row_of<T>(a.grad_out, b, i0 + i, h), nullptr};
    pack_columns(query, query_columns);
    pack_columns(grad, grad_columns);
    Form::pack_values(query, a.dim, s.padded, queries + strip * blocks * kBlock);
    Form::pack_values(grad, a.dim, s.padded, grads + strip * blocks * kBlock);
  }

  // 32 rows -> [blocks], each [16 pairs of features][32 rows].
  void pack_columns(const Row<T>* from, Bf16Pair* out) {
    for (int64_t i = 0; i < kStrip; ++i) Form::pack_query(from[i], a.dim, s.padded, i, packed);
    for (int64_t d = 0; d < blocks; ++d)
      for (int64_t i = 0; i < kStrip; i += kWidth)
        for (int64_t k = 0; k < kWidth; k += 4) {
          vfloat quad[4];
          transpose_quad(reinterpret_cast<const float*>(packed + d * kBlock + i * kWidth + k), kWidth, quad);
          for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + d * kBlock + (k + c) * kPanel + i, (__m512i)quad[c]);
        }
  }

  // ---- a strip of queries ----

  // What the lanes of a strip's queries need: the negated log-sum-exp as a power of two, later 1 / sum; sums over the keys.
  struct Lanes {
    vfloat offset, total, delta;
  };

  template <bool kDropout>
  void softmax(int64_t head, int64_t i0, int64_t n, int64_t strip) {
    Lanes lanes[2];
    for (int half = 0; half < 2; ++half) lanes[half] = {minus_lse(head, i0, n - half * kWidth, half), vfloat{}, vfloat{}};
    DropoutLanes dropout[2] = {{a, head, i0}, {a, head, i0 + kWidth}};
    for (int64_t p = 0; p < panels; ++p) {
      multiply_panel(p);
      for (int half = 0; half < 2; ++half) exponentiate<kDropout>(p, half, dropout[half], lanes[half]);
    }
    for (Lanes& l : lanes) {
      const vfloat inverse = select(l.total == vfloat{}, vfloat{}, splat(1.f) / l.total);
      l.delta *= inverse;
      l.total = inverse;
    }
    for (int64_t p = 0; p < panels; ++p) write_operands(p, strip, lanes);
  }

  // Of queries i0 + 16 half ..; probability 0 where there is none.
  vfloat minus_lse(int64_t head, int64_t i0, int64_t left, int half) const {
    vfloat lse = splat(std::numeric_limits<float>::infinity());
    const float* from = a.lse + head * a.queries + i0 + half * kWidth;
    for (int i = 0; i < std::min<int64_t>(kWidth, left); ++i) lse[i] = from[i];
    return splat(-kLog2e) * lse;
  }

  // The scores of a panel's keys, without the per-key term, and dO V^T.
  void multiply_panel(int64_t p) {
    clear_tiles();
    for (int64_t k = 0; k < blocks; ++k) {
      Form::multiply(key_rows + (p * blocks + k) * kBlock, query_columns + k * kBlock);
      ahead.fetch(kWidth / 2);
    }
    store_tiles(scores + p * kPanel * kStrip, kStrip);
    clear_tiles();
    for (int64_t k = 0; k < blocks; ++k) Form::multiply(value_rows + (p * blocks + k) * kBlock, grad_columns + k * kBlock);
    store_tiles(products + p * kPanel * kStrip, kStrip);
  }

  // Scores -> P, undivided; products -> R P times them, and R P.
  template <bool kDropout>
  PDS_INLINE void exponentiate(int64_t p, int half, DropoutLanes& dropout, Lanes& lanes) {
    const vfloat factor = splat(kLog2e * a.scale), survivor = splat(kDropout ? survivor_factor(a) : 1.f);
    vfloat total = lanes.total, delta = lanes.delta;
    for (int64_t i = 0; i < kPanel; ++i) {
      if (i % kWidth == 0) ahead.fetch(kWidth);
      const int64_t key = p * kPanel + i, at = key * kStrip + half * kWidth;
      const vfloat x = Form::exp2(factor * load(scores + at) + (lanes.offset + splat(keys.bias[key])));
      total += x;
      store(scores + at, x);
      vfloat survived = x;
      if (kDropout) {
        survived = key < keys.count ? select(dropout.keep(keys.index[key]), survivor * x, vfloat{}) : vfloat{};
        store(dropped + at, survived);
      }
      const vfloat product = survived * load(products + at);
      store(products + at, product);
      delta += product;
    }
    lanes.total = total, lanes.delta = delta;
  }

  // R P and dS of a panel as operands; adds dS to the keys' sums.
  PDS_INLINE void write_operands(int64_t p, int64_t strip, const Lanes (&lanes)[2]) {
    const vfloat scale[2] = {splat(a.scale) * lanes[0].total, splat(a.scale) * lanes[1].total};
    Bf16Pair* to = zipped + (strip * panels + p) * kBlock;
    for (int64_t i = 0; i < kPanel; i += 2, to += kPanel) {
      if (i % kWidth == 0) ahead.fetch(kWidth);
      __m512i pair[2];
      for (int64_t r = 0; r < 2; ++r) {
        const int64_t key = p * kPanel + i + r, at = key * kStrip, unit = (p * kStrips + strip) * kBlock + (i + r) * kWidth;
        vfloat grad[2], survived[2];
        for (int half = 0; half < 2; ++half) {
          const vfloat x = load(scores + at + half * kWidth);
          grad[half] = scale[half] * (load(products + at + half * kWidth) - x * lanes[half].delta);
          survived[half] = lanes[half].total * load(dropped + at + half * kWidth);
        }
        Form::put_probabilities(survived[0], survived[1], probabilities + unit);
        pair[r] = (__m512i)_mm512_cvtne2ps_pbh((__m512)grad[1], (__m512)grad[0]);
        _mm512_storeu_si512(score_grads + unit, pair[r]);
        store(sums.scores + key * kWidth, load(sums.scores + key * kWidth) + (grad[0] + grad[1]));
      }
      _mm512_storeu_si512(to, zip(pair[0], pair[1], false));
      _mm512_storeu_si512(to + kWidth, zip(pair[0], pair[1], true));
    }
  }

  // ---- gradients ----

  void multiply_into_queries(int64_t b, int64_t h, int64_t i0, int64_t n, int64_t strip) {
    for (int64_t d = 0; d < blocks; ++d) {
      clear_tiles();
      for (int64_t p = 0; p < panels; ++p)
        Form::multiply(key_columns + (d * panels + p) * kBlock, zipped + (strip * panels + p) * kBlock);
      store_tiles(turned, kStrip);   // [32 features][32 queries]
      for (int64_t f = 0; f < kChunk; f += kWidth)
        for (int64_t i = 0; i < kStrip; i += 4) {
          vfloat quad[4];
          transpose_quad(turned + f * kStrip + i, kStrip, quad);
          for (int c = 0; c < 4; ++c) store(rows + (i + c) * s.padded + d * kChunk + f, quad[c]);
        }
    }
    write_query_grads<T>(a, s, b, h, i0, n, rows, sums.turns);
  }

  // Adds left^T right of `strips` strips to [keys][padded].
  void multiply_into_keys(const Bf16Pair* left, const Bf16Pair* right, int64_t strips, bool accumulate, float* out) {
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t d = 0; d < blocks; ++d) {
        float* to = out + p * kPanel * s.padded + d * kChunk;
        accumulate ? load_tiles(to, s.padded) : clear_tiles();
        for (int64_t strip = 0; strip < strips; ++strip)
          Form::multiply(left + (p * kStrips + strip) * kBlock, right + (strip * blocks + d) * kBlock);
        store_tiles(to, s.padded);
      }
  }

  struct Selected {
    int64_t count = 0, gathered = 0;
    int32_t* index;   // [count] position of each
    float* bias;      // [panels][32]: per-key term, as a power of two; -inf where there is no key
  };

  const TimestepAttentionArgs& a;
  const Sizes s;
  const int64_t blocks;                      // features, in blocks of 32
  int64_t panels = 0;
  Selected keys;
  HeadSums sums;
  Prefetch ahead;
  Bf16Pair *key_rows, *value_rows;           // [panels][blocks of features][32 keys][16]
  Bf16Pair* key_columns;                     // [blocks of features][panels][32 features][16]: k + tau, or the turned k
  Bf16Pair *probabilities, *score_grads;     // [panels][strips][32 keys][16]
  Bf16Pair* zipped;                          // [strips][panels][16][32 queries]: the latter
  Bf16Pair* packed;                          // [blocks], while something is transposed
  Bf16Pair *query_columns, *grad_columns;    // [blocks of features][16][32 queries]
  Bf16Pair *queries, *grads;                 // [strips][blocks of features][16][32 features]
  float *rows, *turned;                      // [32][padded]
  float *scores, *products, *dropped;        // [keys][32 queries]
  [[maybe_unused]] const AmxEngine::Session session{};
};

}  // namespace PDS_ISA
}  // namespace pds
#endif
