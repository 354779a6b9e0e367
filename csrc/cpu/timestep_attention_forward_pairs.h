// Forward of timestep attention on AMX tiles: see timestep_attention_pairs.h.
//
// Scores are [query][key]: sums come out of the tiles with queries as rows, probabilities go back as they are computed, and
// only keys are transposed. A strip of 32 queries passes over the keys in blocks of 64, whose scores and probabilities stay
// in the first-level cache.
#pragma once
#include "cpu/timestep_attention_pairs.h"

#if PDS_AMX
namespace pds {
namespace PDS_ISA {

constexpr int64_t kBlockPanels = 2;   // panels of keys whose scores and probabilities are handled at a time
constexpr int64_t kFetchRows = 4;     // rows of probabilities between two fetches
constexpr float kSlack = 8.f;         // exponents may be as large before the reference is raised

template <typename T>
class PairForward {
  using Form = PairForm<T>;

 public:
  explicit PairForward(const TimestepAttentionArgs& args)
      : a(args), padded(round_up(a.dim, kChunk)), blocks(padded / kChunk),
        bits_row(a.drop_threshold ? round_up(a.keys, 8) : 0), factor(kLog2e * a.scale) {
    static thread_local Scratch scratch;
    const int64_t most = round_up(a.keys, kPanel), panels = most / kPanel;
    scratch.reserve(2 * most + 2 * panels * blocks * Form::kBlock + kWidth * padded +
                    (blocks + kBlockPanels) * (Form::kBlock + kStrip * kPanel) +
                    kStrip * (2 * kWidth + 1 + bits_row / 2) + 512);
    keys.index = reinterpret_cast<int32_t*>(scratch.take(most));
    keys.bias = scratch.take(most);
    keys.panels = take_pairs(scratch, panels * blocks * Form::kBlock);
    keys.values = take_pairs(scratch, panels * blocks * Form::kBlock);
    rows = scratch.take(kWidth * padded);
    queries = take_pairs(scratch, blocks * Form::kBlock);
    scores = scratch.take(kBlockPanels * kStrip * kPanel);
    probabilities = take_pairs(scratch, kBlockPanels * Form::kBlock);
    out = scratch.take(blocks * kStrip * kPanel);
    total = scratch.take(kStrip * kWidth);
    largest = scratch.take(kStrip * kWidth);
    reference = scratch.take(kStrip);
    bits = reinterpret_cast<uint16_t*>(scratch.take(kStrip * bits_row / 2 + 1));
  }

  // Selects the keys of a head; they are packed as its first queries come to them.
  void begin(int64_t b) {
    select_keys(a, b, keys);
    panels = round_up(keys.count, kPanel) / kPanel;
    gathered = 0;
    std::fill_n(keys.index + keys.count, panels * kPanel - keys.count, 0);
  }

  void attend(int64_t b, int64_t h, int64_t begin, int64_t end) {
    const auto exponentiate = a.drop_threshold ? &PairForward::exponentiate<true> : &PairForward::exponentiate<false>;
    for (int64_t i0 = begin; i0 < end; i0 += kStrip) {
      const int64_t n = std::min(kStrip, end - i0);
      start_strip(b, h, i0, n);
      if (a.drop_threshold) draw_bits(b * a.heads + h, i0, n);
      for (int64_t p = 0; p < panels; p += kBlockPanels) {
        const Block block{p, std::min(kBlockPanels, panels - p), n};
        for (; gathered < p + block.panels; ++gathered) gather_panel(b, h, gathered);
        plan_fetches(b, h, i0, block);
        multiply_keys(block);
        set_reference(block);
        (this->*exponentiate)(block);
        multiply_values(block);
      }
      finish_strip(b, h, i0, n);
    }
  }

 private:
  // Up to 64 keys and 32 queries.
  struct Block {
    int64_t first, panels, n;   // panels of keys, number of queries
  };

  Row<T> row(const HeadTensor& t, int64_t b, int64_t i, int64_t h) const {
    return {row_of<T>(t, b, i, h), a.rotary ? tau_row<T>(a, b, i, h) : nullptr};
  }

  // ---- rows that are needed soon: they lie too far apart for the processor to foresee them ----

  // What this strip writes and the next one reads, a share in each block of keys, and the keys after those gathered.
  void plan_fetches(int64_t b, int64_t h, int64_t i0, const Block& block) {
    ahead.clear();
    const auto rows = [&](const HeadTensor& t, int64_t head, int64_t i) {
      const int64_t n = std::max<int64_t>(0, std::min(kStrip, a.queries - i)), end = block.first + block.panels;
      fetch_rows<T>(ahead, t, b, head, i + n * block.first / panels, n * end / panels - n * block.first / panels, a.dim);
    };
    rows(tokens_apart(a, a.out, a.queries, a.heads * a.dim), h, i0);
    const bool last = i0 + kStrip >= a.queries, next_head = last && h + 1 < a.heads;
    if (!last || next_head) rows(a.q, h + next_head, next_head ? 0 : i0 + kStrip);
    const int64_t from = gathered * kPanel, to = std::min(from + kBlockPanels * kPanel, keys.count);
    if (from < to) fetch_keys<T>(ahead, a, b, h, keys.index[from], keys.index[to - 1] + 1 - keys.index[from]);
    else if (next_head && block.first + block.panels == panels)
      fetch_keys<T>(ahead, a, b, h + 1, 0, std::min(kBlockPanels * kPanel, a.keys));
    pace = ahead.lines() / (2 * block.panels * blocks + kStrip / kFetchRows) + 1;
  }

  // ---- keys and values ----

  void gather_panel(int64_t b, int64_t h, int64_t p) {
    for (int64_t i = 0; i < kPanel; i += kWidth) gather_keys(b, h, p, i);
    gather_values(b, h, p);
  }

  // Keys i .. i+15 of panel p.
  void gather_keys(int64_t b, int64_t h, int64_t p, int64_t i) {
    const T *u = head_row<T>(a.u, h, a.dim), *w = head_row<T>(a.w, h, a.dim);
    alignas(64) float terms[kWidth * kWidth];
    const int64_t at = p * kPanel + i, count = std::clamp<int64_t>(keys.count - at, 0, kWidth);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t j = keys.index[at + r];
      const T* tau = a.tau.data && !a.rotary ? tau_row<T>(a, b, j, h) : nullptr;
      store(terms + r * kWidth, Form::gather_key(row(a.k, b, j, h), tau, u, w, a.dim, padded, rows + r * padded));
    }
    std::fill_n(rows + count * padded, (kWidth - count) * padded, 0.f);
    std::fill_n(terms + count * kWidth, (kWidth - count) * kWidth, -std::numeric_limits<float>::infinity());
    store(keys.bias + at, fold_rows(terms, add));
    Form::pack_keys(rows, padded, keys.panels + p * blocks * Form::kBlock + i);
  }

  void gather_values(int64_t b, int64_t h, int64_t p) {
    Row<T> from[kPanel] = {};
    for (int64_t i = 0; i < std::min<int64_t>(kPanel, keys.count - p * kPanel); ++i)
      from[i] = row(a.v, b, keys.index[p * kPanel + i], h);
    Form::pack_values(from, a.dim, padded, keys.values + p * blocks * Form::kBlock);
  }

  // ---- queries ----

  void start_strip(int64_t b, int64_t h, int64_t i0, int64_t n) {
    for (int64_t i = 0; i < n; ++i) Form::pack_query(row(a.q, b, i0 + i, h), a.dim, padded, i, queries);
    std::fill_n(total, kStrip * kWidth, 0.f);
  }

  void multiply_keys(const Block& block) {
    for (int64_t p = 0; p < block.panels; ++p) {
      const Bf16Pair* right = keys.panels + (block.first + p) * blocks * Form::kBlock;
      load_tiles(keys.bias + (block.first + p) * kPanel, 0);
      for (int64_t k = 0; k < blocks; ++k, right += Form::kBlock) {
        Form::multiply(queries + k * Form::kBlock, right);
        ahead.fetch(pace);
      }
      store_tiles(scores + p * kStrip * kPanel, kPanel);
    }
  }

  void multiply_values(const Block& block) {
    for (int64_t d = 0; d < blocks; ++d) {
      float* sums = out + d * kStrip * kPanel;
      block.first ? load_tiles(sums, kPanel) : clear_tiles();
      for (int64_t p = 0; p < block.panels; ++p) {
        Form::multiply(probabilities + p * Form::kBlock, keys.values + ((block.first + p) * blocks + d) * Form::kBlock);
        ahead.fetch(pace);
      }
      store_tiles(sums, kPanel);
    }
  }

  PDS_INLINE const float* score(int64_t i, int64_t p) const { return scores + (p * kStrip + i) * kPanel; }

  // Takes the first block's largest scores as the reference. Later scores seldom pass it by so much that exponents could
  // grow large, and only then are the largest looked for.
  void set_reference(const Block& block) {
    const float slack = kSlack / factor;
    vint passed{};
    for (int64_t i = 0; i < block.n; ++i) {
      vfloat most = vmax(load(score(i, 0)), load(score(i, 0) + kWidth));
      for (int64_t p = 1; p < block.panels; ++p) most = vmax(most, vmax(load(score(i, p)), load(score(i, p) + kWidth)));
      store(largest + i * kWidth, most);
      passed |= most > splat(reference[i] + slack);
    }
    if (block.first > 0 && _mm512_test_epi32_mask((__m512i)passed, (__m512i)passed) == 0) return;
    for (int64_t l = 0; l < block.n; l += kWidth) {
      const vfloat top = fold_rows(largest + l * kWidth, vmax);
      if (block.first == 0) store(reference + l, top);
      else
        for (int64_t i = l; i < std::min(l + kWidth, block.n); ++i)
          if (top[i - l] > reference[i] + slack) raise_reference(i, top[i - l]);
    }
  }

  void raise_reference(int64_t i, float to) {
    const vfloat shrink = Form::exp2(splat(factor * (reference[i] - to)));
    store(total + i * kWidth, shrink * load(total + i * kWidth));
    for (int64_t d = 0; d < padded; d += kWidth) store(sum(i, d), shrink * load(sum(i, d)));
    reference[i] = to;
  }

  // Scores -> exp(scale * (score - reference)), dropped ones 0, as units.
  template <bool kDropout>
  void exponentiate(const Block& block) {
    for (int64_t i = 0; i < block.n; ++i) {
      if (i % kFetchRows == 0) ahead.fetch(pace);
      const vfloat offset = splat(-factor * reference[i]);
      vfloat sum = load(total + i * kWidth);
      for (int64_t p = 0; p < block.panels; ++p) {
        vfloat x[2];
        for (int half = 0; half < 2; ++half) {
          x[half] = Form::exp2(splat(factor) * load(score(i, p) + half * kWidth) + offset);
          sum += x[half];
          if (kDropout) x[half] = select(kept(i, (block.first + p) * kPanel + half * kWidth), x[half], vfloat{});
        }
        Form::put_probabilities(x[0], x[1], probabilities + p * Form::kBlock + i * kWidth);
      }
      store(total + i * kWidth, sum);
    }
  }

  // Whether dropout keeps query i's probabilities of the keys at .. at+15.
  PDS_INLINE vint kept(int64_t i, int64_t at) const {
    const __m512i index = _mm512_loadu_si512(keys.index + at);   // two bytes apart, but four are read
    const vuint drawn = (vuint)_mm512_i32gather_epi32(index, bits + i * bits_row, 2) & 0xFFFFu;
    return drawn >= vuint{} + a.drop_threshold;
  }

  void draw_bits(int64_t head, int64_t i0, int64_t n) {
    for (int64_t l = 0; l < n; l += kWidth) {
      DropoutLanes dropout(a, head, i0 + l);
      for (int64_t j = 0; j < a.keys; j += 8) dropout.write_bits(j, bits_row, bits + l * bits_row + j);
    }
  }

  void finish_strip(int64_t b, int64_t h, int64_t i0, int64_t n) {
    alignas(64) float inverse[kStrip];
    float* lse = a.lse + (b * a.heads + h) * a.queries + i0;
    for (int64_t l = 0; l < n; l += kWidth) {
      const vfloat sum = fold_rows(total + l * kWidth, add);
      store(inverse + l, splat(a.drop_threshold ? survivor_factor(a) : 1.f) / sum);
      store_part(lse + l, splat(a.scale) * load(reference + l) + log_of_positive(sum),
                 static_cast<int>(std::min<int64_t>(kWidth, n - l)));
    }
    T* to = static_cast<T*>(a.out) + ((b * a.queries + i0) * a.heads + h) * a.dim;
    for (int64_t i = 0; i < n; ++i, to += a.heads * a.dim)
      for (int64_t d = 0; d < a.dim; d += kWidth)
        round_to_memory(to + d, splat(inverse[i]) * load(sum(i, d)), a.dim - d);
  }

  // Where features d .. d+15 of query i's values are summed.
  float* sum(int64_t i, int64_t d) const { return out + (d / kPanel * kStrip + i) * kPanel + d % kPanel; }

  // The keys that the mask keeps.
  struct Packed {
    int64_t count = 0, gathered = 0;
    int32_t* index;              // [count] position of each
    float* bias;                 // [panels][32]: per-key term, unscaled; -inf where there is no key
    Bf16Pair *panels, *values;   // [panels][blocks of features], see PairForm
  };

  const TimestepAttentionArgs& a;
  const int64_t padded, blocks;   // features, in blocks of 32
  const int64_t bits_row;
  const float factor;        // of scores: exponents are powers of two
  int64_t panels = 0, gathered = 0;
  Packed keys;
  float* rows;               // [16][padded]
  Bf16Pair* queries;         // [blocks]
  float* scores;             // [panels of a block][32][32]
  Bf16Pair* probabilities;   // [panels of a block]
  float* out;                // [blocks][32][32]: values times probabilities so far
  float *total, *largest;    // [32][16]: of the probabilities and of the scores, spread over the lanes
  float* reference;          // [32]: what the exponents are relative to
  Prefetch ahead;
  int64_t pace = 0;          // lines to fetch at a time
  uint16_t* bits;            // [32][bits_row]: dropout's, by position of the key
  [[maybe_unused]] const AmxEngine::Session session{};
};

}  // namespace PDS_ISA
}  // namespace pds
#endif
