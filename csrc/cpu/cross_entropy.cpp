// Cross-entropy of a linear layer, fused. Forward: each task takes a block of rows, makes the logits of one chunk of the
// vocabulary at a time (they stay in L1) and folds them into a running log-sum-exp. Backward makes the same logits
// again; a task owns a slice of the vocabulary and with it that part of the table's gradient, and keeps a partial
// gradient of x, summed at the end in a fixed order.
#include "common/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace pds {
namespace PDS_ISA {
namespace {

constexpr int64_t kQuantum = 96;      // chunks are whole panels, whole tiles of rows and whole AMX steps
constexpr int64_t kLeastSlices = 8;   // so that up to 8 threads give the same bits
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;
static_assert(kQuantum % kTileRows == 0 && kQuantum % kPanel == 0, "tiles must fit");

// Rows whose logits' gradients are kept at a time (they stay in L2), and the largest chunk of columns (the logits of one
// strip of rows stay in L1).
template <typename Engine>
struct Sizes {
  static constexpr int64_t kBlockRows = 96, kColumns = 384;
};
#if PDS_AMX
template <>
struct Sizes<AmxEngine> {
  static constexpr int64_t kBlockRows = 192, kColumns = 192;
};
#endif

// e^x for x <= 0, to 2e-7; NaN stays NaN. 0 below -64: such a probability is lost in any sum, but its products would be
// denormal numbers, which processors multiply a hundred times slower.
PDS_INLINE vfloat exp_negative(vfloat x) {
  const vfloat magic = splat(12583039.f);   // 1.5 * 2^23 + 127: adding it rounds, and leaves n + 127 in the low bits
  const vfloat shifted = x * splat(kLog2E) + magic;
  const vfloat f = x * splat(kLog2E) - (shifted - magic);
  vfloat p = splat(1.327647069e-3f);   // 2^f, |f| <= 1/2
  p = p * f + splat(9.675541324e-3f);
  p = p * f + splat(5.550713278e-2f);
  p = p * f + splat(2.402211972e-1f);
  p = p * f + splat(6.931469671e-1f);
  p = p * f + splat(1.f);
  return select(x < splat(-64.f), vfloat{}, p * as_float(as_int(shifted) << 23));
}

// Packed inputs of one call. T: float or bfloat16 bits; Engine: see gemm.h. Rows that do not count are left out.
template <typename T, typename Engine>
struct Problem {
  using Unit = typename Engine::Unit;
  static constexpr int64_t kPack = kUnit<Unit>, kRows = Engine::kRows, kBlockRows = Sizes<Engine>::kBlockRows;
  static constexpr int64_t kMostColumns = Sizes<Engine>::kColumns;
  const CrossEntropyArgs& args;
  const int64_t dim;      // padded to whole panels
  const int64_t depth;    // the same in units
  const int64_t chunks, columns;   // the vocabulary, padded, is chunks * columns
  Buffer<int64_t> index;  // [count] the rows that count
  int64_t count = 0, padded_count = 0;
  Buffer<Unit> x;         // [padded_count, depth]
  Buffer<Unit> panels;    // [chunks * columns / kPanel, depth, kPanel]
  Buffer<float> bias;     // [chunks * columns], -inf in the padding

  explicit Problem(const CrossEntropyArgs& a)
      : args(a), dim(round_up(a.dim, kPanel)), depth(dim / kPack), chunks((a.vocab + kMostColumns - 1) / kMostColumns),
        columns(round_up((a.vocab + chunks - 1) / chunks, kQuantum)), index(a.rows), bias(chunks * columns) {
    select_rows();
    padded_count = round_up(count, kRows);
    x = Buffer<Unit>(padded_count * depth);
    panels = Buffer<Unit>(chunks * columns * depth);
    parallel_ranges(padded_count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) pack_x(r);
    });
    if (count > 0) parallel_for(chunks, [&](int64_t c) { pack_table(c); });
  }

  void select_rows() {
    for (int64_t i = 0; i < args.rows; ++i) {
      const int64_t t = args.target[i];
      if (t == args.ignore_index || (args.grad != nullptr && args.grad[i] == 0.f)) continue;
      if (t < 0 || t >= args.vocab)
        throw std::out_of_range("target[" + std::to_string(i) + "] is " + std::to_string(t) + ", but must be in 0.." +
                                std::to_string(args.vocab - 1) + " or ignore_index (" +
                                std::to_string(args.ignore_index) + ")");
      index[count++] = i;
    }
  }

  const T* x_row(int64_t r) const { return static_cast<const T*>(args.x) + index[r] * args.dim; }
  const T* table_row(int64_t v) const { return static_cast<const T*>(args.table) + v * args.dim; }

  void pack_x(int64_t r) {
    if (r < count) pack_row(x_row(r), args.dim, dim, &x[r * depth]);
    else std::memset(&x[r * depth], 0, depth * sizeof(Unit));
  }

  void pack_table(int64_t chunk) {
    Buffer<Unit> rows(kPanel * depth);
    for (int64_t first = chunk * columns; first < (chunk + 1) * columns; first += kPanel) {
      for (int64_t v = first; v < first + kPanel; ++v) {
        Unit* row = &rows[(v - first) * depth];
        if (v < args.vocab) pack_row(table_row(v), args.dim, dim, row);
        else std::memset(row, 0, depth * sizeof(Unit));
        const T* given = static_cast<const T*>(args.bias);
        bias[v] = v >= args.vocab ? -kInfinity : given != nullptr ? to_float(given[v]) : 0.f;
      }
      pack_panel(rows.get(), depth, &panels[first * depth]);
    }
  }

  // Logits of kRows rows from r on, of the columns of one chunk.
  void logits(int64_t r, int64_t chunk, float* out, int64_t stride) const {
    const int64_t v = chunk * columns;
    Engine::product(depth, columns / kPanel, {&x[r * depth], depth, 1}, &panels[v * depth], depth * kPanel, kPanel,
                    {&bias[v], 0}, out, stride);
  }
};

// Running log-sum-exp of one row, one sum per lane. `reference` is near the largest logit so far.
struct LogSumExp {
  static constexpr float kLowest = -1e30f;   // a row with no logit above this has no softmax
  float reference = kLowest;
  vfloat sums = {};

  PDS_INLINE void add(const float* logits, int64_t n) {
    vfloat highest = splat(kLowest);
    for (int64_t j = 0; j < n; j += kWidth) highest = vmax(load(logits + j), highest);   // passes over NaN
    if (any_above(highest, reference)) {
      const float now = PDS_ISA::max(highest);
      sums *= exp_negative(splat(reference - now));
      reference = now;
    }
    for (int64_t j = 0; j < n; j += kWidth) sums += exp_negative(load(logits + j) - splat(reference));
  }

  // As torch: NaN if a logit is NaN or +inf, or all are -inf.
  float value() const { return reference > kLowest ? reference + std::log(PDS_ISA::sum(sums)) : kNan; }
};

template <typename T, typename Engine>
struct Forward : Problem<T, Engine> {
  using Base = Problem<T, Engine>;
  using Base::args;
  Buffer<double> table_sum{0};   // [dim] sum of the table's rows: x . table_sum + bias_sum is the sum of a row's logits
  double bias_sum = 0.0;

  explicit Forward(const CrossEntropyArgs& a) : Base(a) {
    if (args.smoothing > 0.f && this->count > 0) sum_table();
  }

  void sum_table() {
    table_sum = Buffer<double>(args.dim);
    std::fill_n(table_sum.get(), args.dim, 0.0);
    for (int64_t v = 0; v < args.vocab; ++v) {
      const T* row = this->table_row(v);
      for (int64_t k = 0; k < args.dim; ++k) table_sum[k] += to_float(row[k]);
      bias_sum += this->bias[v];
    }
  }

  double mean_logit(int64_t r) const {
    const T* row = this->x_row(r);
    double total = bias_sum;
    for (int64_t k = 0; k < args.dim; ++k) total += to_float(row[k]) * table_sum[k];
    return total / static_cast<double>(args.vocab);
  }

  void block(int64_t first) const {
    [[maybe_unused]] const typename Engine::Session session;
    const int64_t columns = this->columns, end = std::min(first + Base::kBlockRows, this->padded_count);
    LogSumExp lse[Base::kBlockRows];
    float at_target[Base::kBlockRows];
    alignas(64) float logits[Base::kRows * Base::kMostColumns];
    for (int64_t chunk = 0; chunk < this->chunks; ++chunk) {
      for (int64_t r = first; r < end; r += Base::kRows) {
        this->logits(r, chunk, logits, columns);
        for (int64_t i = r; i < std::min(r + Base::kRows, this->count); ++i) {
          const float* row = logits + (i - r) * columns;
          lse[i - first].add(row, columns);
          const int64_t offset = args.target[this->index[i]] - chunk * columns;
          if (offset >= 0 && offset < columns) at_target[i - first] = row[offset];
        }
      }
    }
    for (int64_t r = first; r < std::min(end, this->count); ++r) {
      const float value = lse[r - first].value(), smoothing = args.smoothing;
      float loss = value - (1.f - smoothing) * at_target[r - first];
      if (smoothing > 0.f) loss -= smoothing * static_cast<float>(mean_logit(r));
      args.lse[this->index[r]] = value;
      args.losses[this->index[r]] = loss;
    }
  }

  void run() const {
    std::fill_n(args.losses, args.rows, 0.f);
    std::fill_n(args.lse, args.rows, 0.f);
    const int64_t blocks = (this->count + Base::kBlockRows - 1) / Base::kBlockRows;
    parallel_for(blocks, [&](int64_t b) { block(b * Base::kBlockRows); });
  }
};

// d loss / d logit of a block of rows. By rows: units along the columns; by columns: units along the rows. With float
// units they are one array.
template <typename Engine>
struct LogitGradients {
  using Unit = typename Engine::Unit;
  static constexpr bool kPairs = !std::is_same<Unit, float>::value;
  static constexpr int64_t kBlockRows = Sizes<Engine>::kBlockRows;
  int64_t stride;        // of by_columns, in units; a cache line more than a row, so that a column spreads over L1
  int64_t row_stride;    // of by_rows, in units
  Buffer<Unit> by_rows, by_columns;
  Buffer<float> strip;   // the rows in work, when the units are pairs

  explicit LogitGradients(int64_t columns)
      : stride(columns + 16), row_stride(kPairs ? columns / 2 + 16 : stride), by_rows(kBlockRows * row_stride),
        by_columns(kPairs ? kBlockRows / 2 * stride : 0), strip(kPairs ? Engine::kRows * stride : 0) {}

  float* rows_in_work(int64_t r) const {
    if constexpr (kPairs) return strip.get();
    else return &by_rows[r * stride];
  }
  const Unit* columns_first() const { return kPairs ? by_columns.get() : by_rows.get(); }

  PDS_INLINE void put(int64_t r, int64_t j, vfloat first, vfloat second) const {
    if constexpr (kPairs) put_pairs(&by_rows[r * row_stride + j / 2], &by_columns[r / 2 * stride + j], first, second);
    else store(&by_rows[r * stride + j], first), store(&by_rows[(r + 1) * stride + j], second);
  }

  PDS_INLINE void put_pairs(Bf16Pair* row, Bf16Pair* column, vfloat first, vfloat second) const {
#if defined(__AVX512BF16__)
    const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)first), high = (__m256i)_mm512_cvtneps_pbh((__m512)second);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + row_stride), high);
    const vuint lower = __builtin_convertvector((vbf16)low, vuint), upper = __builtin_convertvector((vbf16)high, vuint);
    _mm512_storeu_si512(column, (__m512i)(lower | (upper << 16)));
#else
    (void)row, (void)column, (void)first, (void)second;   // pairs are only used with AVX-512 BF16
#endif
  }
};

template <typename T, typename Engine>
struct Backward : Problem<T, Engine> {
  using Base = Problem<T, Engine>;
  using Base::args;
  using Unit = typename Engine::Unit;
  static constexpr int64_t kPack = Base::kPack, kRows = Base::kRows, kBlockRows = Base::kBlockRows;
  // The table's gradient is made as G^T x, or, as AMX wants pairs along the rows of its left operand, as (x^T G)^T.
  static constexpr bool kTransposed = Engine::kRows == 32;
  struct Row {
    float lse, scale;         // scale is the gradient of the loss
    float others, at_target;  // what is taken off scale * softmax, elsewhere and at the target
    int32_t target;
  };
  const int64_t slices;
  Buffer<Unit> table_steps;   // [chunks * columns / kPack, dim] the table with units along the vocabulary
  Buffer<Unit> x_pairs;       // x with units along the rows, where that is not x itself: [padded_count / 2, dim], or
                              // transposed: [blocks, dim, kBlockRows / 2]
  Buffer<float> grad_x;       // [slices, padded_count, dim]
  Buffer<Row> row;            // [padded_count]

  explicit Backward(const CrossEntropyArgs& a)
      : Base(a), slices(std::min<int64_t>(this->chunks, std::max<int64_t>(kLeastSlices, num_threads()))),
        table_steps(this->chunks * this->columns / kPack * this->dim),
        x_pairs(kPack == 2 ? round_up(this->padded_count, kBlockRows) / 2 * this->dim : 0),
        grad_x(slices * this->padded_count * this->dim), row(this->padded_count) {
    for (int64_t r = 0; r < this->padded_count; ++r) row[r] = describe(r);
    if (kPack == 2) parallel_ranges(this->padded_count / 2, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_x_pair(i);
    });
  }

  Row describe(int64_t r) const {
    if (r >= this->count) return {1e30f, 0.f, 0.f, 0.f, -1};   // padding: softmax 0
    const int64_t i = this->index[r];
    const float g = args.grad[i], uniform = g * args.smoothing / static_cast<float>(args.vocab);
    return {args.lse[i], g, uniform, uniform + g * (1.f - args.smoothing), static_cast<int32_t>(args.target[i])};
  }

  // kPack rows from `first` on, interleaved; zeros from `end` on.
  void pack_steps(Unit* out, int64_t first, int64_t end, const T* (Base::*row_of)(int64_t) const) const {
    std::memset(out, 0, this->dim * sizeof(Unit));
    for (int64_t p = 0; p < kPack && first + p < end; ++p) {
      const T* from = (this->*row_of)(first + p);
      for (int64_t k = 0; k < args.dim; ++k) {
        if constexpr (kPack == 2) out[k] |= static_cast<Unit>(from[k]) << (16 * p);
        else out[k] = to_float(from[k]);
      }
    }
  }

  void pack_x_pair(int64_t i) const {
    if constexpr (kTransposed) {
      constexpr int64_t kPairs = kBlockRows / 2;
      Buffer<Unit> steps(this->dim);
      pack_steps(steps.get(), 2 * i, this->count, &Base::x_row);
      Unit* out = &x_pairs[i / kPairs * kPairs * this->dim + i % kPairs];
      for (int64_t k = 0; k < this->dim; ++k) out[k * kPairs] = steps[k];
    } else {
      pack_steps(&x_pairs[i * this->dim], 2 * i, this->count, &Base::x_row);
    }
  }

  // Gradients of the logits of kRows rows (r within the block) from the logits; adds their column sums to `sums`.
  void gradients(int64_t first, int64_t r, int64_t chunk, const LogitGradients<Engine>& out, float* sums) const {
    const float* logits = out.rows_in_work(r);
    const Row* info = &row[first + r];
    vint column = splat(static_cast<int32_t>(chunk * this->columns));
    for (int i = 0; i < kWidth; ++i) column[i] += i;
    for (int64_t j = 0; j < this->columns; j += kWidth, column += kWidth) {
      vfloat total = load(sums + j);
      for (int i = 0; i < kRows; i += 2) {
        vfloat g[2];
        for (int s = 0; s < 2; ++s) {
          const Row& of = info[i + s];
          const vfloat logit = load(logits + (i + s) * out.stride + j);
          const vfloat rest = select(column == splat(of.target), splat(of.at_target), splat(of.others));
          g[s] = exp_negative(logit - splat(of.lse)) * splat(of.scale) - rest;
          total += g[s];
        }
        out.put(r + i, j, g[0], g[1]);
      }
      store(sums + j, total);
    }
  }

  void add_to_grad_x(int64_t rows, int64_t chunk, const LogitGradients<Engine>& g, float* out, bool first) const {
    const int64_t dim = this->dim, depth = this->columns / kPack;
    for (int64_t r = 0; r < rows; r += kRows)
      Engine::product(depth, dim / kPanel, {&g.by_rows[r * g.row_stride], g.row_stride, 1},
                      &table_steps[chunk * depth * dim], kPanel, dim, {first ? nullptr : out + r * dim, dim},
                      out + r * dim, dim);
  }

  // `out` is [columns, dim], or [dim, columns] where kTransposed.
  void add_to_grad_table(int64_t start, int64_t rows, const LogitGradients<Engine>& g, float* out) const {
    const int64_t dim = this->dim, columns = this->columns, depth = rows / kPack;
    const bool first = start == 0;
    if constexpr (kTransposed) {
      const Unit* x = &x_pairs[start / 2 * dim];
      for (int64_t k = 0; k < dim; k += kRows)
        Engine::product(depth, columns / kPanel, {x + k * (kBlockRows / 2), kBlockRows / 2, 1}, g.columns_first(),
                        kPanel, g.stride, {first ? nullptr : out + k * columns, columns}, out + k * columns, columns);
    } else {
      const Unit* steps = kPack == 2 ? &x_pairs[start / kPack * dim] : &this->x[start * dim];
      for (int64_t v = 0; v < columns; v += kRows)
        Engine::product(depth, dim / kPanel, {g.columns_first() + v, 1, g.stride}, steps, kPanel, dim,
                        {first ? nullptr : out + v * dim, dim}, out + v * dim, dim);
    }
  }

  void write_columns(int64_t chunk, const float* table, const float* sums) const {
    const int64_t first = chunk * this->columns, end = std::min(first + this->columns, args.vocab);
    const int64_t next_v = kTransposed ? 1 : this->dim, next_k = kTransposed ? this->columns : 1;
    T* out = static_cast<T*>(args.grad_table);
    for (int64_t v = first; v < end; ++v) {
      const float* from = table + (v - first) * next_v;
      for (int64_t k = 0; k < args.dim; ++k) from_float(out[v * args.dim + k], from[k * next_k]);
      if (args.grad_bias != nullptr) from_float(static_cast<T*>(args.grad_bias)[v], sums[v - first]);
    }
  }

  void slice(int64_t s) const {
    [[maybe_unused]] const typename Engine::Session session;
    const int64_t begin = this->chunks * s / slices, end = this->chunks * (s + 1) / slices;
    const LogitGradients<Engine> g(this->columns);
    Buffer<float> table(this->columns * this->dim);
    float sums[Base::kMostColumns];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t steps = this->columns / kPack;
      for (int64_t i = chunk * steps; i < (chunk + 1) * steps; ++i)
        pack_steps(&table_steps[i * this->dim], i * kPack, args.vocab, &Base::table_row);
      std::fill_n(sums, this->columns, 0.f);
      for (int64_t first = 0; first < this->padded_count; first += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, this->padded_count - first);
        for (int64_t r = 0; r < rows; r += kRows) {
          this->logits(first + r, chunk, g.rows_in_work(r), g.stride);
          gradients(first, r, chunk, g, sums);
        }
        add_to_grad_x(rows, chunk, g, &grad_x[(s * this->padded_count + first) * this->dim], chunk == begin);
        add_to_grad_table(first, rows, g, table.get());
      }
      write_columns(chunk, table.get(), sums);
    }
  }

  void write_rows(int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; ++r) {
      T* out = static_cast<T*>(args.grad_x) + this->index[r] * args.dim;
      for (int64_t k = 0; k < args.dim; ++k) {
        float total = 0.f;
        for (int64_t s = 0; s < slices; ++s) total += grad_x[(s * this->padded_count + r) * this->dim + k];
        from_float(out[k], total);
      }
    }
  }

  void run() const {
    if (this->count < args.rows) std::memset(args.grad_x, 0, args.rows * args.dim * sizeof(T));
    if (this->count == 0) {
      std::memset(args.grad_table, 0, args.vocab * args.dim * sizeof(T));
      if (args.grad_bias != nullptr) std::memset(args.grad_bias, 0, args.vocab * sizeof(T));
      return;
    }
    parallel_for(slices, [&](int64_t s) { slice(s); });
    parallel_ranges(this->count, 64, [&](int64_t begin, int64_t end) { write_rows(begin, end); });
  }
};

template <template <typename, typename> class Pass>
void run(const CrossEntropyArgs& args) {
  if (!args.bf16) return Pass<float, FmaEngine<float>>(args).run();
#if PDS_AMX
  if (active_isa() == Isa::amx) return Pass<uint16_t, AmxEngine>(args).run();
#endif
#if defined(__AVX512BF16__)
  Pass<uint16_t, FmaEngine<Bf16Pair>>(args).run();
#else
  Pass<uint16_t, FmaEngine<float>>(args).run();
#endif
}

}  // namespace

void cross_entropy_forward(const CrossEntropyArgs& args) { run<Forward>(args); }
void cross_entropy_backward(const CrossEntropyArgs& args) { run<Backward>(args); }

}  // namespace PDS_ISA
}  // namespace pds
