#include <cmath>
#include <limits>

#include "cpu/timestep_attention_forward_pairs.h"

namespace pds {
namespace PDS_ISA {
namespace {

struct Workspace {
  Keys keys;
  Prefetch ahead;
  float *rows, *columns, *scores, *out;

  Workspace(const TimestepAttentionArgs& a, const Sizes& s) {
    const int64_t block = align_up(std::min(kQueryBlock, a.queries), kWidth);
    Scratch& scratch = thread_scratch();
    scratch.reserve(a.keys * (1 + s.key_ld + s.padded + block) + block * (3 * s.padded + kWidth + 1) + 256);
    keys.index = reinterpret_cast<int32_t*>(scratch.take(a.keys));
    keys.sum = scratch.take(a.keys * s.key_ld);
    keys.value = scratch.take(a.keys * s.padded);
    rows = scratch.take(block * s.padded);
    columns = scratch.take(block * (s.padded + 1));
    scores = scratch.take(a.keys * block);
    out = scratch.take(block * s.padded);
  }
};

// scores [keys][lanes] -> exp(score - largest), dropped ones 0; returns 1 / sum (times the survivors' factor) and the lse
// of the n queries that the lanes hold.
template <bool kDropout>
void softmax(const TimestepAttentionArgs& a, const Keys& keys, int64_t n, int64_t head, int64_t i0, float* scores,
             float* inverse, float* lse) {
  const int64_t lanes = align_up(n, kWidth);
  const float factor = kDropout ? survivor_factor(a) : 1.f;
  for (int64_t l = 0; l < lanes; l += kWidth) {
    float* column = scores + l;
    vfloat top = load(column);
    for (int64_t j = 1; j < keys.count; ++j) top = vmax(top, load(column + j * lanes));
    vfloat total{};
    DropoutLanes dropout(a, head, i0 + l);
    for (int64_t j = 0; j < keys.count; ++j) {
      vfloat p = exp_of_nonpositive(load(column + j * lanes) - top);
      total += p;
      if (kDropout) p = select(dropout.keep(keys.index[j]), p, vfloat{});
      store(column + j * lanes, p);
    }
    store(inverse + l, splat(factor) / total);
    for (int64_t i = 0; i < std::min<int64_t>(kWidth, n - l); ++i) lse[l + i] = top[i] + std::log(total[i]);
  }
}

template <typename T>
void write_rows(const TimestepAttentionArgs& a, const Sizes& s, int64_t b, int64_t h, int64_t i0, int64_t n, const float* rows,
                const float* factors) {
  T* out = static_cast<T*>(a.out) + ((b * a.queries + i0) * a.heads + h) * a.dim;
  for (int64_t i = 0; i < n; ++i, out += a.heads * a.dim) {
    const vfloat f = splat(factors ? factors[i] : 0.f);
    for (int64_t d = 0; d < s.dim; d += kWidth)
      write(out + d, factors ? f * load(rows + i * s.padded + d) : vfloat{}, s.dim - d);
  }
}

// What the next block reads and writes, of this head or the one after it.
template <typename T>
void plan_fetches(const TimestepAttentionArgs& a, Prefetch& ahead, int64_t b, int64_t h, int64_t i0) {
  ahead.clear();
  i0 += kQueryBlock;
  if (i0 >= a.queries) {
    if (++h == a.heads) h = 0, ++b;
    if (b == a.batch) return;
    i0 = 0;
    fetch_keys<T>(ahead, a, b, h);
  }
  const int64_t n = std::min(kQueryBlock, a.queries - i0);
  fetch_rows<T>(ahead, a.q, b, h, i0, n, a.dim);
  fetch_rows<T>(ahead, tokens_apart(a, a.out, a.queries, a.heads * a.dim), b, h, i0, n, a.dim);
}

template <typename T>
void attend_block(const TimestepAttentionArgs& a, const Sizes& s, Workspace& ws, int64_t b, int64_t h, int64_t i0) {
  const int64_t n = std::min(kQueryBlock, a.queries - i0), lanes = align_up(n, kWidth);
  const Keys& keys = ws.keys;
  float* lse_out = a.lse + (b * a.heads + h) * a.queries + i0;
  if (keys.count == 0) {
    std::fill_n(lse_out, n, -std::numeric_limits<float>::infinity());
    return write_rows<T>(a, s, b, h, i0, n, nullptr, nullptr);
  }
  plan_fetches<T>(a, ws.ahead, b, h, i0);
  gather_rows<T>(a.q, s, b, h, i0, n, lanes, ws.rows);
  transpose_queries(s, ws.rows, lanes, a.scale, ws.columns);
  multiply<false>(keys.count, lanes, {s.dim + s.bias, s.key_ld, lanes, lanes, false}, keys.sum, ws.columns, ws.scores,
                  ws.ahead);
  alignas(64) float inverse[kQueryBlock];
  const auto run = a.drop_threshold ? &softmax<true> : &softmax<false>;
  run(a, keys, n, b * a.heads + h, i0, ws.scores, inverse, lse_out);
  multiply<true>(n, s.padded, {keys.count, lanes, s.padded, s.padded, false}, ws.scores, keys.value, ws.out, ws.ahead);
  write_rows<T>(a, s, b, h, i0, n, ws.out, inverse);
}

// The heads of `T` on float products.
template <typename T>
class FloatForward {
 public:
  explicit FloatForward(const TimestepAttentionArgs& args) : a(args), s(args), ws(args, s) {}
  void gather(int64_t b, int64_t h) { gather_keys<T>(a, s, b, h, ws.keys); }
  void attend(int64_t b, int64_t h, int64_t i0) { attend_block<T>(a, s, ws, b, h, i0); }

 private:
  const TimestepAttentionArgs& a;
  const Sizes s;
  Workspace ws;
};

#if PDS_AMX
// The heads of bfloat16: those with few keys on float products.
class AmxForward {
 public:
  explicit AmxForward(const TimestepAttentionArgs& args) : a(args), few(args), many(args) {}
  void gather(int64_t b, int64_t h) {
    pairs = use_pairs(count_keys(a, b));
    pairs ? many.gather(b, h) : few.gather(b, h);
  }
  void attend(int64_t b, int64_t h, int64_t i0) {
    if (!pairs) return few.attend(b, h, i0);
    plan_fetches<uint16_t>(a, ahead, b, h, i0);
    many.attend(b, h, i0, ahead);
  }

 private:
  const TimestepAttentionArgs& a;
  FloatForward<uint16_t> few;
  PairForward many;
  Prefetch ahead;
  bool pairs = false;
};
#endif

template <typename Kernel>
void forward(const TimestepAttentionArgs& a) {
  const int64_t heads = a.batch * a.heads, blocks = (a.queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t parts = heads >= 4 * num_threads() ? 1 : blocks;   // few heads: share out their queries as well
  parallel_ranges(heads * parts, 1, [&](int64_t begin, int64_t end) {
    Kernel kernel(a);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, part = task % parts, b = head / a.heads, h = head % a.heads;
      if (task == begin || part == 0) kernel.gather(b, h);
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
        kernel.attend(b, h, block * kQueryBlock);
    }
  });
}

}  // namespace

void timestep_attention_forward(const TimestepAttentionArgs& args) {
  if (!args.bf16) return forward<FloatForward<float>>(args);
#if PDS_AMX
  if (active_isa() == Isa::amx) return forward<AmxForward>(args);
#endif
  forward<FloatForward<uint16_t>>(args);
}

}  // namespace PDS_ISA
}  // namespace pds
