// The linear layer on AMX tiles: bfloat16, and float32 as three parts (bf16_parts.h). While the tiles multiply, the vector
// units finish the rows of the block before and split the next panel of the weight. Include it from linear.cpp only.
#pragma once
#include "cpu/linear_layout.h"

#if PDS_AMX
namespace pds {
namespace PDS_ISA {
namespace {

constexpr int64_t kTallRows = 32;              // rows of a block
constexpr int64_t kMostTileRows = 384;         // rows of a task, which stay in L2 while the panels of the weight pass:
constexpr int64_t kTileRowBytes = 600 << 10;   // they are fewer if they take more than this,
constexpr int64_t kLeastTileRows = 96;         // but not fewer than these
constexpr int64_t kManyPanels = 40;
constexpr int64_t kLongStretch = 8;            // chunks of a panel whose parts are made at a time: two of these stay in L2,
constexpr int64_t kShortStretch = 1;           // or in L1, where only one block of rows meets them

// A float32 weight for the tiles: see ColumnSplit.
void pack_columns(const LinearArgs& args) {
  const Layout<Bf16Pair, 2> layout(args);
  parallel_for(layout.panels, [&](int64_t p) {
    float* panel = reinterpret_cast<float*>(layout.panel(args.packed, p));
    std::memset(panel, 0, layout.panel_size() * sizeof(Bf16Pair));
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t column = source_row(args, p, j), place = p * kPanel + j;
      const float* from = static_cast<const float*>(args.weight) + column * args.depth;
      const float exponent = column < 0 ? 0.f : parts_exponent(from, args.depth);
      layout.exponents(args.packed)[place] = exponent;
      layout.bias(args.packed)[place] = column >= 0 && args.bias != nullptr ? element(args.bias, false, column) : 0.f;
      for (int64_t k = 0; column >= 0 && k < args.depth; ++k) {
        float* block = panel + k / kChunk * kChunk * kPanel;
        const int64_t unit = k % 16, upper = k / 16 % 2;
        block[(unit * 2 + j / 16) * 32 + upper * 16 + j % 16] =
            _mm_cvtss_f32(_mm_scalef_ss(_mm_set_ss(from[k]), _mm_set_ss(exponent)));
      }
    }
  });
}

template <typename T>
struct TileProduct {
  static constexpr bool kSplit = sizeof(T) == 4;
  static constexpr int kPieces = kSplit ? kParts : 1;
  const LinearArgs& args;
  const Layout<Bf16Pair, kSplit ? 2 : 1> layout;
  const int64_t width;    // columns of out
  const int64_t chunks;   // of 16 units
  int64_t strips;         // of 32 rows
  int64_t blocks, groups; // into how many parts the strips and the panels are split

  explicit TileProduct(const LinearArgs& a)
      : args(a), layout(a), width(a.geglu ? a.columns / 2 : a.columns), chunks(layout.depth / 16) {
    const int64_t threads = num_threads(), small = kTileRowBytes / std::max<int64_t>(1, layout.depth * kPieces * 4);
    const int64_t fitting = std::min(kMostTileRows, std::max(kLeastTileRows, small)) / kTallRows;
    strips = (args.rows + kTallRows - 1) / kTallRows;
    blocks = (strips + fitting - 1) / fitting;
    // Few panels: packing the rows for each group of them would cost more than what larger blocks save.
    if (layout.panels < kManyPanels) blocks = std::max(blocks, std::min(strips, 2 * threads));
    const int64_t tasks = threads == 1 ? 1 : strips == 1 ? threads : 2 * threads;
    groups = std::min(layout.panels, (tasks + blocks - 1) / blocks);
  }

  // Sums of up to 32 rows and one panel, on their way to `out`, row by row.
  struct Rows {
    const TileProduct* product;
    const float* sums = nullptr;
    const float* exponents = nullptr;
    int64_t row = 0, last = 0, p = 0;

    PDS_INLINE void finish_one() {
      if (row < last) product->finish_row(sums, exponents, row++, p), sums += kPanel, exponents += kSplit;
    }
    PDS_INLINE void finish_all() {
      while (row < last) finish_one();
    }
    // The next row's place in memory, which is far from the one before.
    PDS_INLINE void fetch_one() {
      if (row >= last) return;
      const int64_t at = row++ * product->width + p * (product->args.geglu ? kWidth : kPanel);
      const T* out = static_cast<const T*>(product->args.out) + at;
      __builtin_prefetch(out, 1);
      __builtin_prefetch(out + kWidth, 1);
      if (product->args.residual == nullptr) return;
      const T* residual = static_cast<const T*>(product->args.residual) + at;
      __builtin_prefetch(residual);
      __builtin_prefetch(residual + kWidth);
    }
  };

  PDS_INLINE void finish_row(const float* sums, const float* exponent, int64_t row, int64_t p) const {
    vfloat x[2] = {load(sums), load(sums + kWidth)};
    for (int half = 0; half < 2; ++half) {
      const int64_t column = p * kPanel + half * kWidth;
      if (kSplit) {
        const vfloat back = splat(-*exponent) - load(layout.exponents(args.packed) + column);
        x[half] = (vfloat)_mm512_maskz_scalef_ps(0xFFFF, (__m512)x[half], (__m512)back);
      }
      x[half] += load(layout.bias(args.packed) + column);
    }
    const int64_t step = args.geglu ? kWidth : kPanel, column = p * step, n = std::min(step, width - column);
    T* out = static_cast<T*>(args.out) + row * width + column;
    if (args.geglu) return finish_geglu(x[0], x[1], n, out);
    const T* residual = args.residual ? static_cast<const T*>(args.residual) + row * width + column : nullptr;
    if (n < kPanel) {
      alignas(64) float some[kPanel];
      store(some, x[0]), store(some + kWidth, x[1]);
      return finish(some, n, residual, out);
    }
    for (int half = 0; half < 2; ++half)
      store(out + half * kWidth, residual ? x[half] + load(residual + half * kWidth) : x[half]);
  }

  // Where the units of a block of 32 rows are: `row` units from one row to the next, `chunk` from 16 units to the next 16.
  struct Left {
    const Bf16Pair* data;
    int64_t row, chunk;
  };

  // The rows of a task: as they lie, where bfloat16 needs no padding, else in a copy.
  struct Source {
    const TileProduct& product;
    const int64_t first, count, whole;   // whole: the rows that are not copied
    Buffer<Bf16Pair> copied;
    Buffer<float> exponents;

    Source(const TileProduct& of, int64_t from, int64_t rows)
        : product(of), first(from), count(rows),
          whole(!kSplit && of.args.depth == of.layout.depth * 2 ? count / kTallRows * kTallRows : 0),
          copied(round_up(count - whole, kTallRows) * of.layout.depth * kPieces),
          exponents(kSplit ? round_up(count, kTallRows) : 0) {
      const int64_t depth = of.args.depth;
      for (int64_t r = whole; r < count; r += kTallRows) {
        const T* x = static_cast<const T*>(of.args.x) + (first + r) * depth;
        Bf16Pair* to = &copied[(r - whole) * of.layout.depth * kPieces];
        if constexpr (kSplit) split_rows(x, depth, std::min(kTallRows, count - r), depth, to, &exponents[r]);
        else copy_rows(x, std::min(kTallRows, count - r), to);
      }
    }

    void copy_rows(const T* x, int64_t count, Bf16Pair* to) const {
      const int64_t units = product.layout.depth;
      const int64_t depth = product.args.depth;
      for (int64_t i = 0; i < count; ++i) pack_row(x + i * depth, depth, units * 2, to + i * units);
      if (count > 16) std::memset(to + count * units, 0, (kTallRows - count) * units * sizeof(Bf16Pair));
    }

    Left left(int64_t r) const {
      const int64_t units = product.layout.depth;
      if (kSplit) return {&copied[r * units * kPieces], 16, kBlockUnits * kPieces};
      if (r >= whole) return {&copied[(r - whole) * units], units, 16};
      return {static_cast<const Bf16Pair*>(product.args.x) + (first + r) * units, units, 16};
    }
  };

  // Tiles += `count` chunks of the left side times the right one's.
  template <typename Meanwhile>
  PDS_INLINE void multiply(int64_t count, Left left, const Bf16Pair* right, Meanwhile&& meanwhile) const {
    for (; count > 0; --count, left.data += left.chunk, right += kBlockUnits * kPieces) {
      if constexpr (kSplit) {
        multiply_parts(left.data, right, meanwhile);
      } else {
        load_left(left.data, left.row);
        load_right(right, kPanel);
        multiply_tiles();
        meanwhile();
      }
    }
  }

  // The chunks of the weight, one panel after another, in stretches for which the parts stay in the cache.
  struct Stretches {
    const TileProduct* product;
    int64_t most, end;   // chunks of a stretch; the last panel + 1
    int64_t p, first = 0;

    int64_t count() const { return std::min(most, product->chunks - first); }
    const Bf16Pair* at() const {
      return product->layout.panel(product->args.packed, p) + first * kBlockUnits * (kSplit ? 2 : 1);
    }
    bool last() const { return first + most >= product->chunks; }
    Stretches next() const { return {product, most, end, last() ? p + 1 : p, last() ? 0 : first + most}; }
    ColumnSplit split(Bf16Pair* to) const {
      return {reinterpret_cast<const float*>(at()), to, p < end ? count() * kChunk : 0};
    }
  };

  // The rows of the source times panels begin .. end - 1.
  void task(const Source& source, int64_t begin, int64_t end) const {
    const AmxEngine::Session session;
    const int64_t blocks = (source.count + kTallRows - 1) / kTallRows;
    const int64_t most = !kSplit ? chunks : blocks == 1 ? kShortStretch : kLongStretch, kept = chunks > most ? blocks : 1;
    Buffer<Bf16Pair> parts(kSplit ? 2 * most * kPieces * kBlockUnits : 0);
    Buffer<float> sums(2 * kept * kTallRows * kPanel);
    Rows before{this};
    Stretches stretch{this, most, end, begin};
    ColumnSplit split = stretch.split(parts.get());
    for (int64_t turn = 0, sum = 0; stretch.p < end; stretch = stretch.next(), turn ^= 1) {
      const int64_t count = stretch.count(), times = std::max<int64_t>(1, count * (kSplit ? 6 : 1));
      const Bf16Pair* right = kSplit ? &parts[turn * most * kPieces * kBlockUnits] : stretch.at();
      if (kSplit) {
        split.take(split.steps);
        split = stretch.next().split(&parts[(turn ^ 1) * most * kPieces * kBlockUnits]);
      }
      const int64_t row_pace = (kTallRows + times - 1) / times;
      const int64_t pace = (split.steps + blocks * times - 1) / (blocks * times);
      Rows now{this};
      const auto meanwhile = [&] {
        for (int64_t i = 0; i < row_pace; ++i) before.finish_one(), now.fetch_one();
        if (kSplit) split.take(pace);
      };
      for (int64_t r = 0; r < source.count; r += kTallRows) {
        Left left = source.left(r);
        left.data += stretch.first * left.chunk;
        float* to = &sums[(kept > 1 ? stretch.p % 2 * kept + r / kTallRows : sum) * kTallRows * kPanel];
        const bool first = stretch.first == 0, last = stretch.last();
        const Rows rows{this, to, source.exponents.get() + r, source.first + r,
                        source.first + std::min(source.count, r + kTallRows), stretch.p};
        if (last) now = rows;
        if (first) clear_tiles();
        else if (kept > 1) load_tiles(to, kPanel);
        multiply(count, left, right, meanwhile);
        if (last || kept > 1) store_tiles(to, kPanel);
        if (!last) continue;
        before.finish_all();
        before = rows;
        sum ^= 1;
      }
    }
    before.finish_all();
  }

  // The same for up to 16 rows, two panels at a time.
  void short_task(const Source& source, int64_t begin, int64_t end) const {
    const AmxEngine::Session session(source.count);
    constexpr int64_t kSize = kBlockUnits * kPieces, kSource = kBlockUnits * (kSplit ? 2 : 1);
    Buffer<Bf16Pair> parts(kSplit ? 4 * kSize : 0);   // of the present chunk of both panels, and of the next one
    alignas(64) float sums[kTallRows * kPanel];
    ColumnSplit split[2];
    const auto start = [&](int64_t p, int64_t chunk, int64_t turn) {
      for (int64_t i = 0; i < 2; ++i) {
        const auto* from = layout.panel(args.packed, std::min(p + i, end - 1)) + chunk * kSource;
        split[i] = {reinterpret_cast<const float*>(from), &parts[(2 * turn + i) * kSize], p < end ? kChunk : 0};
      }
    };
    const auto take = [&](int64_t count) {
      for (ColumnSplit& one : split) one.take(count);
    };
    if (kSplit) start(begin, 0, 0);
    for (int64_t p = begin, turn = 0; p < end; p += 2) {
      clear_tiles();
      Left left = source.left(0);
      for (int64_t k = 0; k < chunks; ++k, left.data += left.chunk, turn ^= 1) {
        if constexpr (kSplit) {
          take(kChunk);
          k + 1 < chunks ? start(p, k + 1, turn ^ 1) : start(p + 2, 0, turn ^ 1);
          multiply_parts_short(left.data, &parts[2 * turn * kSize], &parts[(2 * turn + 1) * kSize], [&] { take(6); });
        } else {
          PDS_TILE_LOAD(4, left.data, left.row * 4);
          const int64_t other = std::min(p + 1, end - 1);
          multiply_short(layout.panel(args.packed, p) + k * kSize, layout.panel(args.packed, other) + k * kSize);
        }
      }
      store_tiles(sums, kPanel);
      for (int64_t i = 0; i < 2 && p + i < end; ++i)
        Rows{this, sums + i * 16 * kPanel, source.exponents.get(), source.first, source.first + source.count, p + i}
            .finish_all();
    }
  }

  void run() const {
    const auto panels = [&](int64_t g) { return layout.panels * g / groups; };
    if (blocks == 1) {
      const Source all(*this, 0, args.rows);
      return parallel_for(groups, [&](int64_t g) {
        args.rows > 16 ? task(all, panels(g), panels(g + 1)) : short_task(all, panels(g), panels(g + 1));
      });
    }
    parallel_for(blocks * groups, [&](int64_t i) {
      const int64_t b = i / groups, g = i % groups, first = strips * b / blocks * kTallRows;
      const int64_t last = std::min(args.rows, strips * (b + 1) / blocks * kTallRows);
      task(Source(*this, first, last - first), panels(g), panels(g + 1));
    });
  }
};

}  // namespace
}  // namespace PDS_ISA
}  // namespace pds
#endif
