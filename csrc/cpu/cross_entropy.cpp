// Cross-entropy of a linear layer, fused. Forward: each thread takes blocks of rows, makes the logits of one chunk of
// the vocabulary at a time (they stay in L1) and folds them into a running log-sum-exp. Backward makes the same logits
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

constexpr int64_t kBlockRows = 96;    // rows whose gradients of logits are kept at a time (96 x 384 floats: in L2)
constexpr int64_t kMostColumns = 384;   // largest chunk: kTileRows of its rows are 18 KB, in L1
constexpr int64_t kQuantum = 96;      // chunks are whole panels and whole tiles of rows
constexpr int64_t kLeastSlices = 8;   // so that up to 8 threads give the same bits
static_assert(kBlockRows % kTileRows == 0 && kQuantum % kTileRows == 0 && kQuantum % kPanel == 0, "tiles must fit");
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Tile = vfloat[kTileRows][2];

PDS_INLINE void store_tile(const Tile& tile, float* out, int64_t stride) {
  for (int i = 0; i < kTileRows; ++i) {
    store(out + i * stride, tile[i][0]);
    store(out + i * stride + kWidth, tile[i][1]);
  }
}

PDS_INLINE void load_tile(Tile& tile, const float* from, int64_t stride, bool zero) {
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < 2; ++j) tile[i][j] = zero ? vfloat{} : load(from + i * stride + j * kWidth);
}

// Packed inputs of one call. T: float or bfloat16 bits; Unit: see gemm.h. Rows that do not count are left out.
template <typename T, typename Unit>
struct Problem {
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
      : args(a), dim(round_up(a.dim, kPanel)), depth(dim / kUnit<Unit>),
        chunks((a.vocab + kMostColumns - 1) / kMostColumns),
        columns(round_up((a.vocab + chunks - 1) / chunks, kQuantum)), index(a.rows), bias(chunks * columns) {
    select_rows();
    padded_count = round_up(count, kTileRows);
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

  // Logits of rows r .. r + kTileRows - 1 and the columns of one chunk.
  void logits(int64_t r, int64_t chunk, float* out, int64_t stride) const {
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int64_t v = chunk * columns + j;
      Tile tile;
      for (int i = 0; i < kTileRows; ++i) tile[i][0] = load(&bias[v]), tile[i][1] = load(&bias[v + kWidth]);
      accumulate_tile<Unit>(depth, &x[r * depth], depth, 1, &panels[v * depth], kPanel, tile);
      store_tile(tile, out + j, stride);
    }
  }
};

// Running log-sum-exp of one row.
struct LogSumExp {
  float max = -kInfinity, sum = 0.f;
  bool nan = false;

  PDS_INLINE void add(const float* logits, int64_t n) {
    vfloat highest = splat(-kInfinity), total = {};
    vint bad = {};
    for (int64_t j = 0; j < n; j += kWidth) {
      const vfloat x = load(logits + j);
      highest = vmax(x, highest);   // passes over NaN, hence `bad`
      bad |= x != x;
    }
    const float now = std::max(max, PDS_ISA::max(highest));
    for (int i = 0; i < kWidth; ++i) nan |= bad[i] != 0;
    if (!(std::fabs(now) < kInfinity)) {   // no finite logit so far, or one that is +inf
      max = now;
      return;
    }
    for (int64_t j = 0; j < n; j += kWidth) total += vexp(load(logits + j) - splat(now));
    sum = (max == -kInfinity ? 0.f : sum * std::exp(max - now)) + PDS_ISA::sum(total);
    max = now;
  }

  // As torch: NaN if a logit is NaN or +inf, or all are -inf.
  float value() const { return nan || !(std::fabs(max) < kInfinity) ? kNan : max + std::log(sum); }
};

template <typename T, typename Unit>
struct Forward : Problem<T, Unit> {
  using Problem<T, Unit>::args;
  Buffer<double> table_sum{0};   // [dim] sum of the table's rows: x . table_sum + bias_sum is the sum of a row's logits
  double bias_sum = 0.0;

  explicit Forward(const CrossEntropyArgs& a) : Problem<T, Unit>(a) {
    if (args.smoothing > 0.f) sum_table();
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
    const int64_t columns = this->columns, end = std::min(first + kBlockRows, this->padded_count);
    LogSumExp lse[kBlockRows];
    float at_target[kBlockRows];
    alignas(64) float logits[kTileRows * kMostColumns];
    for (int64_t chunk = 0; chunk < this->chunks; ++chunk) {
      for (int64_t r = first; r < end; r += kTileRows) {
        this->logits(r, chunk, logits, columns);
        for (int64_t i = r; i < std::min(r + kTileRows, this->count); ++i) {
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
    const int64_t blocks = (this->count + kBlockRows - 1) / kBlockRows;
    parallel_for(blocks, [&](int64_t b) { block(b * kBlockRows); });
  }
};

// d loss / d logit of a block of rows. By rows: units along the columns; by columns: units along the rows. With float
// units they are one array.
template <typename Unit>
struct LogitGradients {
  int64_t stride;        // of by_columns, in units; one more cache line than a row, so that a column spreads over L1
  int64_t row_stride;    // of by_rows, in units
  Buffer<Unit> by_rows, by_columns;
  Buffer<float> strip;   // the kTileRows rows being made, when the units are pairs
  static constexpr bool kPairs = !std::is_same<Unit, float>::value;

  explicit LogitGradients(int64_t columns)
      : stride(columns + 16), row_stride(kPairs ? columns / 2 + 16 : stride), by_rows(kBlockRows * row_stride),
        by_columns(kPairs ? kBlockRows / 2 * stride : 0), strip(kPairs ? kTileRows * stride : 0) {}

  float* rows_in_work(int64_t r) const {
    if constexpr (kPairs) return strip.get();
    else return &by_rows[r * stride];
  }
  const Unit* columns_first() const { return kPairs ? by_columns.get() : by_rows.get(); }

  PDS_INLINE void put(int64_t r, int64_t j, vfloat first, vfloat second) const {
    if constexpr (kPairs) {
      uint16_t* row = reinterpret_cast<uint16_t*>(&by_rows[r * row_stride]) + j;
      store(row, first);
      store(row + 2 * row_stride, second);
      const vuint low = __builtin_convertvector(*reinterpret_cast<const vbf16_unaligned*>(row), vuint);
      const vuint high = __builtin_convertvector(*reinterpret_cast<const vbf16_unaligned*>(row + 2 * row_stride), vuint);
      std::memcpy(&by_columns[r / 2 * stride + j], &(const vuint&)(low | (high << 16)), sizeof(vuint));
    } else {
      store(&by_rows[r * stride + j], first);
      store(&by_rows[(r + 1) * stride + j], second);
    }
  }
};

template <typename T, typename Unit>
struct Backward : Problem<T, Unit> {
  using Problem<T, Unit>::args;
  static constexpr int64_t kPack = kUnit<Unit>;
  const int64_t slices;
  Buffer<Unit> table_steps;   // [chunks * columns / kPack, dim] the table with units along the vocabulary
  Buffer<Unit> x_pairs;       // [padded_count / 2, dim] x with units along the rows, where that is not x itself
  Buffer<float> grad_x;       // [slices, padded_count, dim]
  struct Row {
    float lse, scale, uniform, hit;   // gradient of logit v: scale * exp(logit - lse) - uniform - (v == target) * hit
    int32_t target;
  };
  Buffer<Row> row;            // [padded_count]

  explicit Backward(const CrossEntropyArgs& a)
      : Problem<T, Unit>(a), slices(std::min<int64_t>(this->chunks, std::max<int64_t>(kLeastSlices, num_threads()))),
        table_steps(this->chunks * this->columns / kPack * this->dim),
        x_pairs(kPack == 2 ? this->padded_count / 2 * this->dim : 0),
        grad_x(slices * this->padded_count * this->dim), row(this->padded_count) {
    for (int64_t r = 0; r < this->padded_count; ++r) row[r] = describe(r);
    if (kPack == 2) parallel_ranges(this->padded_count / 2, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_steps(&x_pairs[i * this->dim], 2 * i, this->count, &Backward::x_row);
    });
  }

  Row describe(int64_t r) const {
    if (r >= this->count) return {0.f, 0.f, 0.f, 0.f, -1};
    const int64_t i = this->index[r];
    const float lse = args.lse[i], g = args.grad[i], smoothing = args.smoothing;
    // vexp turns NaN into 0, so a row without a finite loss gets its NaN through the scale.
    return {lse, lse == lse ? g : kNan, g * smoothing / static_cast<float>(args.vocab), g * (1.f - smoothing),
            static_cast<int32_t>(args.target[i])};
  }

  // kPack rows from `first` on, interleaved; zeros from `end` on.
  void pack_steps(Unit* out, int64_t first, int64_t end, const T* (Problem<T, Unit>::*row_of)(int64_t) const) const {
    std::memset(out, 0, this->dim * sizeof(Unit));
    for (int64_t p = 0; p < kPack && first + p < end; ++p) {
      const T* from = (this->*row_of)(first + p);
      for (int64_t k = 0; k < args.dim; ++k) {
        if constexpr (kPack == 2) out[k] |= static_cast<Unit>(from[k]) << (16 * p);
        else out[k] = to_float(from[k]);
      }
    }
  }

  // Gradients of the logits of kTileRows rows (r within the block) from the logits; adds their column sums to `sums`.
  void gradients(int64_t first, int64_t r, int64_t chunk, const LogitGradients<Unit>& out, float* sums) const {
    const float* logits = out.rows_in_work(r);
    const Row* info = &row[first + r];
    vint column = splat(static_cast<int32_t>(chunk * this->columns));
    for (int i = 0; i < kWidth; ++i) column[i] += i;
    for (int64_t j = 0; j < this->columns; j += kWidth, column += kWidth) {
      vfloat total = load(sums + j);
      for (int i = 0; i < kTileRows; i += 2) {
        vfloat g[2];
        for (int s = 0; s < 2; ++s) {
          const Row& of = info[i + s];
          const vfloat p = vexp(load(logits + (i + s) * out.stride + j) - splat(of.lse));
          g[s] = p * splat(of.scale) - splat(of.uniform) - select(column == splat(of.target), splat(of.hit), vfloat{});
          total += g[s];
        }
        out.put(r + i, j, g[0], g[1]);
      }
      store(sums + j, total);
    }
  }

  void add_to_grad_x(int64_t rows, int64_t chunk, const LogitGradients<Unit>& g, float* out, bool first) const {
    const int64_t dim = this->dim, depth = this->columns / kPack;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      for (int64_t k = 0; k < dim; k += kPanel) {
        Tile tile;
        load_tile(tile, out + r * dim + k, dim, first);
        accumulate_tile<Unit>(depth, &g.by_rows[r * g.row_stride], g.row_stride, 1,
                              &table_steps[chunk * depth * dim + k], dim, tile);
        store_tile(tile, out + r * dim + k, dim);
      }
    }
  }

  void add_to_grad_table(int64_t start, int64_t rows, const LogitGradients<Unit>& g, float* out) const {
    const int64_t dim = this->dim;
    const Unit* steps = kPack == 2 ? &x_pairs[start / kPack * dim] : &this->x[start * dim];
    for (int64_t v = 0; v < this->columns; v += kTileRows) {
      for (int64_t k = 0; k < dim; k += kPanel) {
        Tile tile;
        load_tile(tile, out + v * dim + k, dim, start == 0);
        accumulate_tile<Unit>(rows / kPack, g.columns_first() + v, 1, g.stride, steps + k, dim, tile);
        store_tile(tile, out + v * dim + k, dim);
      }
    }
  }

  void write_columns(int64_t chunk, const float* table, const float* sums) const {
    const int64_t first = chunk * this->columns, end = std::min(first + this->columns, args.vocab);
    T* out = static_cast<T*>(args.grad_table);
    for (int64_t v = first; v < end; ++v) {
      const float* from = table + (v - first) * this->dim;
      for (int64_t k = 0; k < args.dim; ++k) from_float(out[v * args.dim + k], from[k]);
      if (args.grad_bias != nullptr) from_float(static_cast<T*>(args.grad_bias)[v], sums[v - first]);
    }
  }

  void slice(int64_t s) const {
    const int64_t begin = this->chunks * s / slices, end = this->chunks * (s + 1) / slices;
    const LogitGradients<Unit> g(this->columns);
    Buffer<float> table(this->columns * this->dim);
    float sums[kMostColumns];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t steps = this->columns / kPack;
      for (int64_t i = chunk * steps; i < (chunk + 1) * steps; ++i)
        pack_steps(&table_steps[i * this->dim], i * kPack, args.vocab, &Backward::table_row);
      std::fill_n(sums, this->columns, 0.f);
      for (int64_t first = 0; first < this->padded_count; first += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, this->padded_count - first);
        for (int64_t r = 0; r < rows; r += kTileRows) {
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
#if defined(__AVX512BF16__)
  using Bf16Unit = Bf16Pair;
#else
  using Bf16Unit = float;
#endif
  if (args.bf16) Pass<uint16_t, Bf16Unit>(args).run();
  else Pass<float, float>(args).run();
}

}  // namespace

void cross_entropy_forward(const CrossEntropyArgs& args) { run<Forward>(args); }
void cross_entropy_backward(const CrossEntropyArgs& args) { run<Backward>(args); }

}  // namespace PDS_ISA
}  // namespace pds
