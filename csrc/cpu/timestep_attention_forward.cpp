#include <limits>
#include <type_traits>

#include "cpu/timestep_attention_forward_pairs.h"

namespace pds {
namespace PDS_ISA {
namespace {

constexpr int64_t kKeyBlock = 64;   // keys whose scores, probabilities and values stay in the first-level cache together

// The softmax of a block of queries over the keys seen so far.
struct Softmax {
  alignas(64) float top[kQueryBlock];      // largest score
  alignas(64) float total[kQueryBlock];    // sum of exp(score - top)
  alignas(64) float shrunk[kQueryBlock];   // what the last keys made of exp(-top): a factor for the sums before them
};

struct Workspace {
  Keys keys;
  Prefetch ahead;
  Softmax softmax;
  float *rows, *columns, *scores, *out;

  Workspace(const TimestepAttentionArgs& a, const Sizes& s) {
    const int64_t block = align_up(std::min(kQueryBlock, a.queries), kWidth);
    Scratch& scratch = thread_scratch();
    scratch.reserve(Keys::floats(a, s) + block * (3 * s.padded + kKeyBlock) + 256);
    keys.take(scratch, a, s);
    rows = scratch.take(block * s.padded);
    columns = scratch.take(block * s.padded);
    scores = scratch.take(kKeyBlock * block);
    out = scratch.take(block * s.padded);
  }
};

PDS_INLINE vfloat largest(const float* column, int64_t count, int64_t lanes, vfloat top) {
  vfloat most[4] = {top, top, top, top};   // chains side by side, for their latency
  int64_t j = 0;
  for (; j + 4 <= count; j += 4)
    for (int i = 0; i < 4; ++i) most[i] = vmax(load(column + (j + i) * lanes), most[i]);
  for (; j < count; ++j) most[0] = vmax(load(column + j * lanes), most[0]);
  return vmax(vmax(most[0], most[1]), vmax(most[2], most[3]));
}

// The scores [count][lanes] of the keys from j0 on -> exp(score - top), dropped ones 0. Returns whether `top` grew, and so
// `shrunk` matters.
template <bool kDropout>
bool add_keys(const TimestepAttentionArgs& a, const Keys& keys, int64_t j0, int64_t count, int64_t lanes, int64_t head,
              int64_t i0, float* scores, Softmax& softmax) {
  vint grew{};
  for (int64_t l = 0; l < lanes; l += kWidth) {
    float* column = scores + l;
    const vfloat before = j0 ? load(softmax.top + l) : splat(-std::numeric_limits<float>::infinity());
    const vfloat top = largest(column, count, lanes, before);
    const vfloat shrunk = exp_of_nonpositive(before - top);
    vfloat total = j0 ? load(softmax.total + l) * shrunk : vfloat{};
    DropoutLanes dropout(a, head, i0 + l);
    for (int64_t j = 0; j < count; ++j) {
      vfloat p = exp_of_nonpositive(load(column + j * lanes) - top);
      total += p;
      if (kDropout) p = select(dropout.keep(keys.index[j0 + j]), p, vfloat{});
      store(column + j * lanes, p);
    }
    store(softmax.top + l, top), store(softmax.total + l, total), store(softmax.shrunk + l, shrunk);
    grew |= top != before;
  }
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= grew[i];
  return any != 0;
}

inline void scale_rows(int64_t n, int64_t padded, const float* factors, float* rows) {
  for (int64_t i = 0; i < n; ++i, rows += padded)
    for (int64_t d = 0; d < padded && factors[i] != 1.f; d += kWidth) store(rows + d, splat(factors[i]) * load(rows + d));
}

// Turns the totals to what the sums of values are multiplied with; writes the log-sum-exp of n queries.
inline void finish_softmax(const TimestepAttentionArgs& a, int64_t n, Softmax& softmax, float* lse) {
  const vfloat factor = splat(a.drop_threshold ? survivor_factor(a) : 1.f);
  for (int64_t l = 0; l < n; l += kWidth) {
    const vfloat total = load(softmax.total + l);
    write(lse + l, load(softmax.top + l) + log_of_positive(total), n - l);
    store(softmax.total + l, factor / total);
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

// What the block of queries after this one reads and writes; where it is the next head's, the first keys of that as well.
template <typename T>
void plan_fetches(const TimestepAttentionArgs& a, Prefetch& ahead, int64_t b, int64_t h, int64_t i0) {
  ahead.clear();
  i0 += kQueryBlock;
  if (i0 >= a.queries) {
    if (++h == a.heads) h = 0, ++b;
    if (b == a.batch) return;
    i0 = 0;
    fetch_keys<T>(ahead, a, b, h, 0, std::min(kKeyBlock, a.keys));
  }
  const int64_t n = std::min(kQueryBlock, a.queries - i0);
  fetch_rows<T>(ahead, a.q, b, h, i0, n, a.dim);
  fetch_rows<T>(ahead, tokens_apart(a, a.out, a.queries, a.heads * a.dim), b, h, i0, n, a.dim);
}

// The keys up to number `end` that are still to be gathered.
template <typename T>
void plan_key_fetches(const TimestepAttentionArgs& a, Prefetch& ahead, const Keys& keys, int64_t b, int64_t h, int64_t end) {
  ahead.clear();
  if (keys.gathered >= end) return;
  const int64_t first = keys.index[keys.gathered];
  fetch_keys<T>(ahead, a, b, h, first, keys.index[end - 1] + 1 - first);
}

// Whether rows of T are what products read and write.
template <typename T>
bool are_plain_rows(const Sizes& s) {
  return std::is_same_v<T, float> && s.dim == s.padded;
}

// The scaled queries as columns.
template <typename T>
void take_queries(const TimestepAttentionArgs& a, const Sizes& s, Workspace& ws, int64_t b, int64_t h, int64_t i0, int64_t n,
                  int64_t lanes) {
  if (n == lanes && !a.rotary && are_plain_rows<T>(s))
    return transpose(row_of<float>(a.q, b, i0, h), a.q.token, lanes, s.padded, a.scale, ws.columns);
  gather_rows<T>(a, s, a.q, a.rotary, b, h, i0, n, lanes, ws.rows);
  transpose(ws.rows, s.padded, lanes, s.padded, a.scale, ws.columns);
}

// Values times probabilities where all keys are one block: straight to where the rows belong.
inline void multiply_out(const TimestepAttentionArgs& a, const Sizes& s, Workspace& ws, int64_t b, int64_t h, int64_t i0,
                         int64_t n, int64_t lanes, float* lse_out) {
  finish_softmax(a, n, ws.softmax, lse_out);
  const int64_t row = a.heads * a.dim;
  multiply<true>(n, s.padded, {ws.keys.count, lanes, s.padded, row, false, nullptr, ws.softmax.total}, ws.scores,
                 ws.keys.value, static_cast<float*>(a.out) + ((b * a.queries + i0) * a.heads + h) * a.dim, ws.ahead);
  ws.ahead.finish();
}

template <typename T>
void attend_block(const TimestepAttentionArgs& a, const Sizes& s, Workspace& ws, int64_t b, int64_t h, int64_t i0) {
  const int64_t n = std::min(kQueryBlock, a.queries - i0), lanes = align_up(n, kWidth);
  Keys& keys = ws.keys;
  float* lse_out = a.lse + (b * a.heads + h) * a.queries + i0;
  if (keys.count == 0) {
    std::fill_n(lse_out, n, -std::numeric_limits<float>::infinity());
    return write_rows<T>(a, s, b, h, i0, n, nullptr, nullptr);
  }
  take_queries<T>(a, s, ws, b, h, i0, n, lanes);
  const auto add = a.drop_threshold ? &add_keys<true> : &add_keys<false>;
  const int64_t blocks = (keys.count + kKeyBlock - 1) / kKeyBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t j0 = keys.count * block / blocks, j1 = keys.count * (block + 1) / blocks, count = j1 - j0;
    gather_keys<T>(a, s, b, h, j1, keys);
    if (block + 1 == blocks) plan_fetches<T>(a, ws.ahead, b, h, i0);
    else plan_key_fetches<T>(a, ws.ahead, keys, b, h, keys.count * (block + 2) / blocks);
    multiply<false>(count, lanes, {s.dim, s.padded, lanes, lanes, false, s.bias ? keys.bias + j0 : nullptr},
                    keys.sum + j0 * s.padded, ws.columns, ws.scores, ws.ahead);
    const bool grew = add(a, keys, j0, count, lanes, b * a.heads + h, i0, ws.scores, ws.softmax);
    if (blocks == 1 && are_plain_rows<T>(s)) return multiply_out(a, s, ws, b, h, i0, n, lanes, lse_out);
    if (block > 0 && grew) scale_rows(n, s.padded, ws.softmax.shrunk, ws.out);
    multiply<true>(n, s.padded, {count, lanes, s.padded, s.padded, block > 0}, ws.scores, keys.value + j0 * s.padded,
                   ws.out, ws.ahead);
    ws.ahead.finish();
  }
  finish_softmax(a, n, ws.softmax, lse_out);
  write_rows<T>(a, s, b, h, i0, n, ws.out, ws.softmax.total);
}

// The heads of `T` on float products.
template <typename T>
class FloatForward {
 public:
  explicit FloatForward(const TimestepAttentionArgs& args) : a(args), s(args), ws(args, s) {}
  void begin(int64_t b, int64_t) { select_keys(a, b, ws.keys); }
  void attend(int64_t b, int64_t h, int64_t begin, int64_t end) {
    for (int64_t i0 = begin; i0 < end; i0 += kQueryBlock) attend_block<T>(a, s, ws, b, h, i0);
  }

 private:
  const TimestepAttentionArgs& a;
  const Sizes s;
  Workspace ws;
};

#if PDS_AMX
// The heads of `T`: those with few keys on float products, which pad nothing. Which one a head takes depends on its own
// keys alone, so that a sentence comes out the same in any batch.
template <typename T>
class AmxForward {
 public:
  explicit AmxForward(const TimestepAttentionArgs& args) : a(args), few(args), many(args) {}
  void begin(int64_t b, int64_t h) {
    pairs = a.scale > 0 && count_keys(a, b) >= PairForm<T>::kFewestKeys;
    pairs ? many.begin(b) : few.begin(b, h);
  }
  void attend(int64_t b, int64_t h, int64_t begin, int64_t end) {
    pairs ? many.attend(b, h, begin, end) : few.attend(b, h, begin, end);
  }

 private:
  const TimestepAttentionArgs& a;
  FloatForward<T> few;
  PairForward<T> many;
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
      if (task == begin || part == 0) kernel.begin(b, h);
      kernel.attend(b, h, blocks * part / parts * kQueryBlock,
                    std::min(blocks * (part + 1) / parts * kQueryBlock, a.queries));
    }
  });
}

}  // namespace

void timestep_attention_forward(const TimestepAttentionArgs& args) {
#if PDS_AMX
  if (active_isa() == Isa::amx) return args.bf16 ? forward<AmxForward<uint16_t>>(args) : forward<AmxForward<float>>(args);
#endif
  args.bf16 ? forward<FloatForward<uint16_t>>(args) : forward<FloatForward<float>>(args);
}

}  // namespace PDS_ISA
}  // namespace pds
