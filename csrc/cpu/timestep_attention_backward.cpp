// Backward of timestep attention. With P the probabilities, R the dropout factors (0 or 1 / survival) and dO given:
//   dV = (R P)^T dO      dP = R (dO V^T)      dS = scale P (dP - sum_j P dP)      dQ = dS (K + tau)      dK' = dS^T Q
//   c_j = sum_i dS_ij    dk_j = dK'_j + c_j u    dtau_j = dK'_j + c_j w    du = sum_j c_j k_j    dw = sum_j c_j tau_j
// P is recomputed from the scores and the saved log-sum-exp, and divided by its sums, as forward may round scores
// otherwise. In the rotary form q, k and v are the turned ones, and their gradients are turned back as they are written.
#include <limits>

#include "cpu/timestep_attention_backward_pairs.h"
#include "cpu/timestep_attention_gradients.h"

namespace pds {
namespace PDS_ISA {
namespace {

struct Workspace {
  Keys keys;
  Prefetch ahead;
  HeadSums sums;
  float *rows, *columns, *grad_rows, *grad_columns, *probabilities, *dropped, *grad_scores, *grad_queries;

  Workspace(const TimestepAttentionArgs& a, const Sizes& s) {
    const int64_t block = align_up(std::min(kQueryBlock, a.queries), kWidth);
    Scratch& scratch = thread_scratch();
    scratch.reserve(Keys::floats(a, s) + HeadSums::floats(a, s) + block * (3 * a.keys + 5 * s.padded) + 512);
    keys.take(scratch, a, s);
    sums.take(scratch, a, s);
    rows = scratch.take(block * s.padded);
    columns = scratch.take(block * s.padded);
    grad_rows = scratch.take(block * s.padded);
    grad_columns = scratch.take(block * s.padded);
    grad_queries = scratch.take(block * s.padded);
    probabilities = scratch.take(a.keys * block);
    dropped = a.drop_threshold ? scratch.take(a.keys * block) : probabilities;
    grad_scores = scratch.take(a.keys * block);
  }
};

// scores in ws.probabilities -> P and R P, undivided; dO V^T in ws.grad_scores -> dS; adds dS to the lanes of ws.sums.scores.
// Log-sum-exps -> what P is still to be multiplied with.
template <bool kDropout>
void softmax_backward(const TimestepAttentionArgs& a, Workspace& ws, int64_t lanes, int64_t head, int64_t i0, float* lse) {
  const vfloat factor = splat(kDropout ? survivor_factor(a) : 1.f);
  for (int64_t l = 0; l < lanes; l += kWidth) {
    const vfloat row_lse = load(lse + l);
    vfloat delta{}, total{};
    DropoutLanes dropout(a, head, i0 + l);
    for (int64_t j = 0; j < ws.keys.count; ++j) {
      const int64_t at = j * lanes + l;
      const vfloat p = exp_of_nonpositive(load(ws.probabilities + at) - row_lse);
      store(ws.probabilities + at, p);
      total += p;
      vfloat survived = p;
      if (kDropout) {
        survived = select(dropout.keep(ws.keys.index[j]), factor * p, vfloat{});
        store(ws.dropped + at, survived);
      }
      const vfloat product = survived * load(ws.grad_scores + at);
      delta += product;
      store(ws.grad_scores + at, product);
    }
    const vfloat inverse = select(total == vfloat{}, vfloat{}, splat(1.f) / total), scale = splat(a.scale) * inverse;
    delta *= inverse;
    store(lse + l, inverse);
    for (int64_t j = 0; j < ws.keys.count; ++j) {
      const int64_t at = j * lanes + l;
      const vfloat grad = scale * (load(ws.grad_scores + at) - load(ws.probabilities + at) * delta);
      store(ws.grad_scores + at, grad);
      store(ws.sums.scores + j * kWidth, load(ws.sums.scores + j * kWidth) + grad);
    }
  }
}

// What the next block reads and writes, of this head or (after the gradients of the keys) the one after it.
template <typename T>
void plan_fetches(const TimestepAttentionArgs& a, Prefetch& ahead, int64_t b, int64_t h, int64_t i0) {
  ahead.clear();
  i0 += kQueryBlock;
  if (i0 >= a.queries) {
    if (!streams_gradients(a)) fetch_key_gradients<T>(ahead, a, b, h);
    if (++h == a.heads) h = 0, ++b;
    if (b == a.batch) return;
    i0 = 0;
    fetch_keys<T>(ahead, a, b, h, 0, a.keys);
  }
  const int64_t n = std::min(kQueryBlock, a.queries - i0);
  for (const HeadTensor& t : {a.q, a.grad_out}) fetch_rows<T>(ahead, t, b, h, i0, n, a.dim);
  if (!streams_gradients(a)) fetch_query_gradients<T>(ahead, a, b, h, i0, n);
}

template <typename T>
void differentiate_block(const TimestepAttentionArgs& a, const Sizes& s, Workspace& ws, int64_t b, int64_t h, int64_t i0,
                         bool accumulate) {
  const int64_t n = std::min(kQueryBlock, a.queries - i0), lanes = align_up(n, kWidth), count = ws.keys.count;
  if (count == 0) return write_query_grads<T>(a, s, b, h, i0, n, nullptr, nullptr);
  plan_fetches<T>(a, ws.ahead, b, h, i0);
  gather_rows<T>(a, s, a.q, a.rotary, b, h, i0, n, lanes, ws.rows);
  transpose(ws.rows, s.padded, lanes, s.padded, a.scale, ws.columns);
  gather_rows<T>(a, s, a.grad_out, false, b, h, i0, n, lanes, ws.grad_rows);
  transpose(ws.grad_rows, s.padded, lanes, s.padded, 1.f, ws.grad_columns);
  alignas(64) float lse[kQueryBlock];   // later 1 / sum
  std::fill_n(lse, kQueryBlock, std::numeric_limits<float>::infinity());   // probability 0 in the padding lanes
  std::copy_n(a.lse + (b * a.heads + h) * a.queries + i0, n, lse);

  multiply<false>(count, lanes, {s.dim, s.padded, lanes, lanes, false, s.bias ? ws.keys.bias : nullptr}, ws.keys.sum,
                  ws.columns, ws.probabilities, ws.ahead);
  multiply<false>(count, lanes, {s.dim, s.padded, lanes, lanes, false}, ws.keys.value, ws.grad_columns,
                  ws.grad_scores, ws.ahead);
  const auto run = a.drop_threshold ? &softmax_backward<true> : &softmax_backward<false>;
  run(a, ws, lanes, b * a.heads + h, i0, lse);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = i * s.padded; d < (i + 1) * s.padded; d += kWidth)
      store(ws.grad_rows + d, splat(lse[i]) * load(ws.grad_rows + d));
  const TileShape to_keys{n, lanes, s.padded, s.padded, accumulate};
  multiply<false>(count, s.padded, to_keys, ws.dropped, ws.grad_rows, ws.sums.value, ws.ahead);
  multiply<false>(count, s.padded, to_keys, ws.grad_scores, ws.rows, ws.sums.key, ws.ahead);
  multiply<true>(n, s.padded, {count, lanes, s.padded, s.padded, false}, ws.grad_scores, ws.keys.sum,
                 ws.grad_queries, ws.ahead);
  ws.ahead.finish();
  write_query_grads<T>(a, s, b, h, i0, n, ws.grad_queries, ws.sums.turns);
}

// Adds the rows of grad_tau_rows to the table rows they came from: one head per task, tokens in order.
void scatter_table(const TimestepAttentionArgs& a) {
  const int64_t stride = a.heads * a.dim;
  parallel_for(a.heads, [&](int64_t h) {
    float* table = a.grad_table + h * a.dim;
    const float* rows = a.grad_tau_rows + h * a.dim;
    for (int64_t r = 0; r < a.table_rows; ++r) std::fill_n(table + r * stride, a.dim, 0.f);
    for (int64_t n = 0; n < a.batch * a.keys; ++n) {
      float* to = table + a.timesteps[n] * stride;
      for (int64_t d = 0; d < a.dim; ++d) to[d] += rows[n * stride + d];
    }
  });
}

// The heads of `T` on float products.
template <typename T>
class FloatBackward {
 public:
  explicit FloatBackward(const TimestepAttentionArgs& args) : a(args), s(args), ws(args, s) {}
  void differentiate(int64_t b, int64_t h) {
    select_keys(a, b, ws.keys);
    gather_keys<T>(a, s, b, h, ws.keys.count, ws.keys);
    ws.sums.clear(a, s, ws.keys.count);
    for (int64_t i0 = 0; i0 < a.queries; i0 += kQueryBlock) differentiate_block<T>(a, s, ws, b, h, i0, i0 > 0);
    finish_head<T>(a, s, ws.keys, ws.sums, b, h);
  }

 private:
  const TimestepAttentionArgs& a;
  const Sizes s;
  Workspace ws;
};

#if PDS_AMX
// The heads of bfloat16: those with few keys on float products, which pad nothing.
class AmxBackward {
 public:
  explicit AmxBackward(const TimestepAttentionArgs& args) : a(args), few(args), many(args) {}
  void differentiate(int64_t b, int64_t h) {
    a.scale > 0 && count_keys(a, b) >= PairBackward::kFewestKeys ? many.differentiate(b, h) : few.differentiate(b, h);
  }

 private:
  const TimestepAttentionArgs& a;
  FloatBackward<uint16_t> few;
  PairBackward many;
};
#endif

template <typename T>
void sum_sentences(const TimestepAttentionArgs& a, const float* parts, void* out) {
  const int64_t row = a.heads * a.dim;
  for (int64_t d = 0; d < row && out; d += kWidth) {
    vfloat sum{};
    for (int64_t b = 0; b < a.batch; ++b) sum += read(parts + b * row + d, row - d);
    round_to_memory(static_cast<T*>(out) + d, sum, row - d);
  }
}

template <typename T>
void sum_biases(const TimestepAttentionArgs& a) {
  sum_sentences<T>(a, a.grad_u, a.sum_u);
  sum_sentences<T>(a, a.grad_w, a.sum_w);
}

template <typename Kernel>
void backward(const TimestepAttentionArgs& a) {
  parallel_ranges(a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
    Kernel kernel(a);
    for (int64_t head = begin; head < end; ++head) kernel.differentiate(head / a.heads, head % a.heads);
    finish_streams();
  });
  if (a.grad_table) scatter_table(a);
}

}  // namespace

void timestep_attention_backward(const TimestepAttentionArgs& args) {
#if PDS_AMX
  if (args.bf16 && active_isa() == Isa::amx) return backward<AmxBackward>(args);
#endif
  args.bf16 ? backward<FloatBackward<uint16_t>>(args) : backward<FloatBackward<float>>(args);
}

void timestep_attention_sum_biases(const TimestepAttentionArgs& args) {
  args.bf16 ? sum_biases<uint16_t>(args) : sum_biases<float>(args);
}

}  // namespace PDS_ISA
}  // namespace pds
