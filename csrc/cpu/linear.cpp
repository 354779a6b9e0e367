// A linear layer whose result for a row does not depend on the other rows: every sum runs over the features in one order,
// on the same instructions, wherever the row lies. Library products choose their kernels by the shape, so that a sentence
// would come out differently in another batch. Bias, residual and GEGLU are applied to a tile while it is in the cache.
// Here is the form for fused multiply-adds; linear_tiles.h has that for AMX.
#include "common/linear.h"

#include "cpu/linear_layout.h"
#include "cpu/linear_tiles.h"

namespace pds {
namespace PDS_ISA {
namespace {

constexpr int64_t kMostRows = 192;        // rows of a task,
constexpr int64_t kRowBytes = 1 << 19;    // which stay in L2 while the panels of the weight pass

#if defined(__AVX512BF16__)
using LowUnit = Bf16Pair;
#else
using LowUnit = float;   // bfloat16 is widened
#endif

template <typename T, typename Unit>
void pack(const LinearArgs& args) {
  const Layout<Unit> layout(args);
  const int64_t padded = layout.depth * kUnit<Unit>;
  parallel_for(layout.panels, [&](int64_t p) {
    Buffer<Unit> rows(kPanel * layout.depth);
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t row = source_row(args, p, j);
      const bool biased = row >= 0 && args.bias != nullptr;
      layout.bias(args.packed)[p * kPanel + j] = biased ? element(args.bias, args.bf16, row) : 0.f;
      if (row < 0) std::memset(&rows[j * layout.depth], 0, layout.depth * sizeof(Unit));
      else pack_row(static_cast<const T*>(args.weight) + row * args.depth, args.depth, padded, &rows[j * layout.depth]);
    }
    pack_panel(rows.get(), layout.depth, layout.panel(args.packed, p));
  });
}

template <typename T, typename Engine>
struct Product {
  using Unit = typename Engine::Unit;
  static constexpr int64_t kRows = Engine::kRows;
  static constexpr bool kSame = sizeof(T) * kUnit<Unit> == sizeof(Unit);   // x needs no conversion
  const LinearArgs& args;
  const Layout<Unit> layout;
  const int64_t width;   // columns of out
  const bool direct;     // x can be multiplied as it lies
  int64_t block, groups; // rows of a task, and into how many parts the panels are split

  explicit Product(const LinearArgs& a)
      : args(a), layout(a), width(a.geglu ? a.columns / 2 : a.columns),
        direct(kSame && a.depth == layout.depth * kUnit<Unit>) {
    const int64_t threads = num_threads(), fair = round_up((args.rows + 2 * threads - 1) / (2 * threads), kRows);
    const int64_t fitting = std::min(kMostRows, kRowBytes / std::max<int64_t>(1, layout.depth * sizeof(Unit)));
    block = std::min(fair, std::max<int64_t>(1, fitting / kRows) * kRows);
    const int64_t blocks = (args.rows + block - 1) / block, wanted = threads > 1 ? 4 * threads : 1;
    groups = std::min(layout.panels, (wanted + blocks - 1) / blocks);
  }

  const T* row(int64_t r) const { return static_cast<const T*>(args.x) + r * args.depth; }

  // Rows first .. first + count - 1 in units, zero rows up to a whole tile, at `out`.
  void copy_rows(int64_t first, int64_t count, Unit* out) const {
    const int64_t padded = layout.depth * kUnit<Unit>;
    for (int64_t i = 0; i < count; ++i) pack_row(row(first + i), args.depth, padded, out + i * layout.depth);
    std::memset(out + count * layout.depth, 0, (round_up(count, kRows) - count) * layout.depth * sizeof(Unit));
  }

  void finish_tile(const float* tile, int64_t first, int64_t count, int64_t p) const {
    const int64_t step = args.geglu ? kWidth : kPanel, column = p * step, n = std::min(step, width - column);
    T* out = static_cast<T*>(args.out) + first * width + column;
    const T* residual = static_cast<const T*>(args.residual);
    if (residual != nullptr) residual += first * width + column;
    for (int64_t i = 0; i < count; ++i, out += width, tile += kPanel) {
      if (args.geglu) finish_geglu(load(tile), load(tile + kWidth), n, out);
      else finish(tile, n, residual, out);
      if (residual != nullptr) residual += width;
    }
  }

  void task(int64_t first, int64_t count, int64_t begin, int64_t end) const {
    [[maybe_unused]] const typename Engine::Session session;
    const int64_t whole = direct ? count / kRows * kRows : 0;   // the rest is copied, so that no row past x is read
    Buffer<Unit> copied(round_up(count - whole, kRows) * layout.depth);
    if (count > whole) copy_rows(first + whole, count - whole, copied.get());
    alignas(64) float tile[kRows * kPanel];
    for (int64_t p = begin; p < end; ++p) {
      const Start bias{layout.bias(args.packed) + p * kPanel, 0};
      for (int64_t r = 0; r < count; r += kRows) {
        const Unit* left = r < whole ? reinterpret_cast<const Unit*>(row(first + r)) : &copied[(r - whole) * layout.depth];
        Engine::product(layout.depth, 1, {left, layout.depth, 1}, layout.panel(args.packed, p), 0, kPanel, bias, tile, kPanel);
        finish_tile(tile, first + r, std::min(kRows, count - r), p);
      }
    }
  }

  void run() const {
    const int64_t blocks = (args.rows + block - 1) / block;
    parallel_for(blocks * groups, [&](int64_t i) {
      const int64_t first = i / groups * block, g = i % groups;
      task(first, std::min(block, args.rows - first), layout.panels * g / groups, layout.panels * (g + 1) / groups);
    });
  }
};

}  // namespace

void linear_pack(const LinearArgs& args) {
#if PDS_AMX
  if (!args.bf16 && active_isa() == Isa::amx) return pack_columns(args);
#endif
  args.bf16 ? pack<uint16_t, LowUnit>(args) : pack<float, float>(args);
}

void linear(const LinearArgs& args) {
  if (args.rows == 0 || args.columns == 0) return;
#if PDS_AMX
  if (active_isa() == Isa::amx) return args.bf16 ? TileProduct<uint16_t>(args).run() : TileProduct<float>(args).run();
#endif
  args.bf16 ? Product<uint16_t, FmaEngine<LowUnit>>(args).run() : Product<float, FmaEngine<float>>(args).run();
}

}  // namespace PDS_ISA
}  // namespace pds
