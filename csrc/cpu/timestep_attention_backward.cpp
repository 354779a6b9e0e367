// Backward of timestep attention. With P the probabilities, R the dropout factors (0 or 1 / survival) and dO given:
//   dV = (R P)^T dO      dP = R (dO V^T)      dS = scale P (dP - sum_j P dP)      dQ = dS (K + tau)      dK' = dS^T Q
//   c_j = sum_i dS_ij    dk_j = dK'_j + c_j u    dtau_j = dK'_j + c_j w    du = sum_j c_j k_j    dw = sum_j c_j tau_j
// P is recomputed from the scores and the saved log-sum-exp, and divided by its sums, as forward may round scores
// otherwise. In the rotary form q, k and v are the turned ones, and their gradients are turned back as they are written.
#include <limits>

#include "cpu/timestep_attention.h"

namespace pds {
namespace PDS_ISA {
namespace {

struct Workspace {
  Keys keys;
  Prefetch ahead;
  float *rows, *columns, *grad_rows, *grad_columns, *probabilities, *dropped, *grad_scores, *grad_queries;
  float *grad_key, *grad_value, *key_sums;   // [keys][padded] twice, [keys][kWidth]
  float *grad_u, *grad_w;                    // [padded]
  float* grad_turns;                         // [keys][padded]: tau's gradient in the rotary form

  Workspace(const TimestepAttentionArgs& a, const Sizes& s) {
    const int64_t block = align_up(std::min(kQueryBlock, a.queries), kWidth);
    Scratch& scratch = thread_scratch();
    scratch.reserve(Keys::floats(a, s) + a.keys * ((a.rotary ? 3 : 2) * s.padded + kWidth + 3 * block) + 5 * block * s.padded +
                    2 * s.padded + 512);
    keys.take(scratch, a, s);
    rows = scratch.take(block * s.padded);
    columns = scratch.take(block * s.padded);
    grad_rows = scratch.take(block * s.padded);
    grad_columns = scratch.take(block * s.padded);
    grad_queries = scratch.take(block * s.padded);
    probabilities = scratch.take(a.keys * block);
    dropped = a.drop_threshold ? scratch.take(a.keys * block) : probabilities;
    grad_scores = scratch.take(a.keys * block);
    grad_key = scratch.take(a.keys * s.padded);
    grad_value = scratch.take(a.keys * s.padded);
    key_sums = scratch.take(a.keys * kWidth);
    grad_u = scratch.take(s.padded);
    grad_w = scratch.take(s.padded);
    grad_turns = a.rotary ? scratch.take(a.keys * s.padded) : nullptr;
  }
};

// scores in ws.probabilities -> P and R P, undivided; dO V^T in ws.grad_scores -> dS; adds dS to the lanes of ws.key_sums.
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
      store(ws.key_sums + j * kWidth, load(ws.key_sums + j * kWidth) + grad);
    }
  }
}

// The gradient of a row from that of the turned row; adds to tau's.
template <typename T>
void write_turned_back(const Sizes& s, const T* tau, const T* row, const float* grad, T* out, float* grad_tau) {
  for (int64_t d = 0; d < s.dim; d += kWidth)
    write(out + d, turn_back(tau, s.dim, d, read(row + d, s.dim - d), load(grad + d), grad_tau), s.dim - d);
}

template <typename T>
void write_query_grads(const TimestepAttentionArgs& a, const Sizes& s, int64_t b, int64_t h, int64_t i0, int64_t n,
                       const float* rows, float* grad_turns) {
  T* out = static_cast<T*>(a.grad_q) + (b * a.queries + i0) * a.grad_q_token + h * a.dim;
  for (int64_t i = 0; i < n; ++i, out += a.grad_q_token) {
    if (a.rotary && rows) {
      write_turned_back(s, tau_row<T>(a, b, i0 + i, h), row_of<T>(a.q, b, i0 + i, h), rows + i * s.padded, out,
                        grad_turns + (i0 + i) * s.padded);
      continue;
    }
    for (int64_t d = 0; d < s.dim; d += kWidth)
      write(out + d, rows ? load(rows + i * s.padded + d) : vfloat{}, s.dim - d);
  }
}

// What the next block reads and writes, of this head or (after the gradients of the keys) the one after it.
template <typename T>
void plan_fetches(const TimestepAttentionArgs& a, Prefetch& ahead, int64_t b, int64_t h, int64_t i0) {
  ahead.clear();
  i0 += kQueryBlock;
  if (i0 >= a.queries) {
    for (const void* grad : {a.grad_k, a.grad_v})
      fetch_rows<T>(ahead, tokens_apart(a, grad, a.keys, a.grad_k_token), b, h, 0, a.keys, a.dim);
    fetch_rows<T>(ahead, tokens_apart(a, a.grad_tau, a.keys, a.heads * a.dim), b, h, 0, a.keys, a.dim);
    if (++h == a.heads) h = 0, ++b;
    if (b == a.batch) return;
    i0 = 0;
    fetch_keys<T>(ahead, a, b, h, 0, a.keys);
  }
  const int64_t n = std::min(kQueryBlock, a.queries - i0);
  for (const HeadTensor& t : {a.q, a.grad_out, tokens_apart(a, a.grad_q, a.queries, a.grad_q_token)})
    fetch_rows<T>(ahead, t, b, h, i0, n, a.dim);
}

template <typename T>
void differentiate_block(const TimestepAttentionArgs& a, const Sizes& s, Workspace& ws, int64_t b, int64_t h, int64_t i0,
                         bool accumulate) {
  const int64_t n = std::min(kQueryBlock, a.queries - i0), lanes = align_up(n, kWidth), count = ws.keys.count;
  if (count == 0) return write_query_grads<T>(a, s, b, h, i0, n, nullptr, nullptr);
  plan_fetches<T>(a, ws.ahead, b, h, i0);
  gather_rows<T>(a, s, a.q, a.rotary, b, h, i0, n, lanes, ws.rows);
  transpose(ws.rows, lanes, s.padded, a.scale, ws.columns);
  gather_rows<T>(a, s, a.grad_out, false, b, h, i0, n, lanes, ws.grad_rows);
  transpose(ws.grad_rows, lanes, s.padded, 1.f, ws.grad_columns);
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
  multiply<false>(count, s.padded, to_keys, ws.dropped, ws.grad_rows, ws.grad_value, ws.ahead);
  multiply<false>(count, s.padded, to_keys, ws.grad_scores, ws.rows, ws.grad_key, ws.ahead);
  multiply<true>(n, s.padded, {count, lanes, s.padded, s.padded, false}, ws.grad_scores, ws.keys.sum,
                 ws.grad_queries, ws.ahead);
  write_query_grads<T>(a, s, b, h, i0, n, ws.grad_queries, ws.grad_turns);
}

// Writes dk, dv and dtau of key j from the head's sums (row `at`, or zeros where the mask removed the key).
template <typename T>
void write_key_grads(const TimestepAttentionArgs& a, const Sizes& s, const Workspace& ws, int64_t b, int64_t j, int64_t h,
                     int64_t at, float sum) {
  const int64_t out = ((b * a.keys + j) * a.heads + h) * a.dim, out_kv = (b * a.keys + j) * a.grad_k_token + h * a.dim;
  const T *u = head_row<T>(a.u, h, a.dim), *w = head_row<T>(a.w, h, a.dim);
  for (int64_t d = 0; d < s.dim; d += kWidth) {
    const int64_t left = s.dim - d;
    const vfloat key = at < 0 ? vfloat{} : load(ws.grad_key + at * s.padded + d);
    const vfloat value = at < 0 ? vfloat{} : load(ws.grad_value + at * s.padded + d);
    write(static_cast<T*>(a.grad_v) + out_kv + d, value, left);
    write(static_cast<T*>(a.grad_k) + out_kv + d, u ? key + splat(sum) * read(u + d, left) : key, left);
    if (!a.grad_tau && !a.grad_tau_rows) continue;
    const vfloat time = w ? key + splat(sum) * read(w + d, left) : key;
    if (a.grad_tau_rows) write(a.grad_tau_rows + out + d, time, left);
    else write(static_cast<T*>(a.grad_tau) + out + d, time, left);
  }
}

// The same in the rotary form.
template <typename T>
void write_turned_key_grads(const TimestepAttentionArgs& a, const Sizes& s, const Workspace& ws, int64_t b, int64_t j,
                            int64_t h, int64_t at) {
  const int64_t out = ((b * a.keys + j) * a.heads + h) * a.dim, out_kv = (b * a.keys + j) * a.grad_k_token + h * a.dim;
  T *grad_k = static_cast<T*>(a.grad_k) + out_kv, *grad_v = static_cast<T*>(a.grad_v) + out_kv;
  float* grad_tau = ws.grad_turns + j * s.padded;
  if (at < 0) {
    std::fill_n(grad_k, s.dim, T{});
    std::fill_n(grad_v, s.dim, T{});
  } else {
    const T* tau = tau_row<T>(a, b, j, h);
    write_turned_back(s, tau, row_of<T>(a.k, b, j, h), ws.grad_key + at * s.padded, grad_k, grad_tau);
    write_turned_back(s, tau, row_of<T>(a.v, b, j, h), ws.grad_value + at * s.padded, grad_v, grad_tau);
  }
  for (int64_t d = 0; d < s.dim; d += kWidth) {
    if (a.grad_tau_rows) write(a.grad_tau_rows + out + d, load(grad_tau + d), s.dim - d);
    else write(static_cast<T*>(a.grad_tau) + out + d, load(grad_tau + d), s.dim - d);
  }
}

template <typename T>
void add_scaled_row(const Sizes& s, float factor, const T* row, float* sum) {
  for (int64_t d = 0; d < s.dim; d += kWidth) store(sum + d, load(sum + d) + splat(factor) * read(row + d, s.dim - d));
}

template <typename T>
void finish_head(const TimestepAttentionArgs& a, const Sizes& s, Workspace& ws, int64_t b, int64_t h) {
  std::fill_n(ws.grad_u, s.padded, 0.f);
  std::fill_n(ws.grad_w, s.padded, 0.f);
  int64_t at = 0;
  for (int64_t j = 0; j < a.keys; ++j) {
    const bool kept = at < ws.keys.count && ws.keys.index[at] == j;
    const float sum = kept ? add_lanes(load(ws.key_sums + at * kWidth)) : 0.f;
    if (a.rotary) write_turned_key_grads<T>(a, s, ws, b, j, h, kept ? at : -1);
    else write_key_grads<T>(a, s, ws, b, j, h, kept ? at : -1, sum);
    if (!kept) continue;
    if (a.grad_u) add_scaled_row(s, sum, row_of<T>(a.k, b, j, h), ws.grad_u);
    if (a.grad_w) add_scaled_row(s, sum, tau_row<T>(a, b, j, h), ws.grad_w);
    ++at;
  }
  const int64_t out = (b * a.heads + h) * a.dim;
  if (a.grad_u) std::copy_n(ws.grad_u, a.dim, a.grad_u + out);
  if (a.grad_w) std::copy_n(ws.grad_w, a.dim, a.grad_w + out);
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

template <typename T>
void backward(const TimestepAttentionArgs& a) {
  const Sizes sizes(a);
  parallel_ranges(a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
    Workspace ws(a, sizes);
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / a.heads, h = head % a.heads;
      select_keys(a, b, ws.keys);
      gather_keys<T>(a, sizes, b, h, ws.keys.count, ws.keys);
      std::fill_n(ws.key_sums, ws.keys.count * kWidth, 0.f);
      if (a.rotary) std::fill_n(ws.grad_turns, a.keys * sizes.padded, 0.f);
      for (int64_t i0 = 0; i0 < a.queries; i0 += kQueryBlock)
        differentiate_block<T>(a, sizes, ws, b, h, i0, i0 > 0);
      finish_head<T>(a, sizes, ws, b, h);
    }
  });
  if (a.grad_table) scatter_table(a);
}

}  // namespace

void timestep_attention_backward(const TimestepAttentionArgs& args) {
  args.bf16 ? backward<uint16_t>(args) : backward<float>(args);
}

}  // namespace PDS_ISA
}  // namespace pds
