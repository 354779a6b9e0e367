// Exact nearest rows. The score to maximise is s = x . e + b with b = -|e|^2 / 2 (L2) or the caller's bias (dot). A matrix
// product in bfloat16 (or float32, where that is faster) gives s to within a proven bound eps = |x| * share + slack, so
// only rows with s + eps >= the best s - eps can win; they are few, and float64 decides among them, ties to the lowest
// id. What the product cannot take (values that are not finite, or huge) goes to float64 at once.
#include "common/nearest.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace pds {
namespace PDS_ISA {
namespace {

constexpr double kHuge = 2305843009213693952.0;   // 2^61: products of two such norms still fit float32
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kMostRows = 192;        // rows of a task
constexpr int64_t kTableBytes = 1 << 19;  // part of the table that stays in L2 while a task's rows pass
constexpr int kMostCandidates = 64;       // per row; more, and the row is searched in float64

PDS_INLINE float at(const void* data, bool bf16, int64_t i) {
  return bf16 ? to_float(static_cast<const uint16_t*>(data)[i]) : static_cast<const float*>(data)[i];
}

void row_to_float(const void* data, bool bf16, int64_t row, int64_t dim, float* out) {
  if (bf16) for (int64_t k = 0; k < dim; ++k) out[k] = to_float(static_cast<const uint16_t*>(data)[row * dim + k]);
  else std::memcpy(out, static_cast<const float*>(data) + row * dim, dim * sizeof(float));
}

double squared_norm(const float* x, int64_t dim) {
  double total = 0.0;
  for (int64_t k = 0; k < dim; ++k) total += static_cast<double>(x[k]) * x[k];
  return total;
}

// Rounds a padded row to the units of the product.
PDS_INLINE void to_units(const float* row, int64_t padded, float* out) { std::memcpy(out, row, padded * sizeof(float)); }
PDS_INLINE void to_units(const float* row, int64_t padded, Bf16Pair* out) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(out);
  for (int64_t k = 0; k < padded; k += kWidth) store(halves + k, load(row + k));
}

// Bound of |s computed - s| / (|x| |e|), of which the rounding of the sums alone. Rounding to bfloat16 costs 2^-9 per
// factor, the subtraction of the centre 2^-24; each of dim + 4 sums 2^-24, twice that for slack.
template <typename Unit>
constexpr double relative_error(int64_t dim) {
  const double inputs = kUnit<Unit> == 2 ? 1.0 / 256 + 1.0 / 65536 : 1.0 / (1 << 22);
  return inputs + static_cast<double>(dim + 4) / (1 << 23);
}
constexpr double sum_error(int64_t dim) { return static_cast<double>(dim + 4) / (1 << 23); }
// The product units flush numbers below 2^-126 to 0: at most this much per factor of norm 1, and as much for products.
constexpr double flush_error(int64_t dim) { return static_cast<double>(dim) * 2.4e-38; }

float rounded_up(double x) { return std::nextafter(static_cast<float>(x), kInfinity); }

// ---- packing ----

void find_wild(const NearestArgs& args) {
  const PackedTable& packed = args.packed;
  parallel_ranges(args.vocab, 256, [&](int64_t begin, int64_t end) {
    Buffer<float> row(args.dim);
    for (int64_t v = begin; v < end; ++v) {
      row_to_float(args.table, args.bf16, v, args.dim, row.get());
      const double norm = std::sqrt(squared_norm(row.get(), args.dim));
      const double bias = args.bias != nullptr ? std::fabs(at(args.bias, args.bf16, v)) : 0.0;
      packed.wild[v + 1] = !(norm < kHuge && bias < kHuge * kHuge / 16);   // NaN is wild, too
    }
  });
  int32_t count = 0;
  for (int64_t v = 0; v < args.vocab; ++v) {
    const bool wild = packed.wild[v + 1] != 0;
    packed.bias[v] = wild ? -kInfinity : 0.f;
    if (wild) packed.wild[1 + count++] = static_cast<int32_t>(v);
  }
  packed.wild[0] = count;
}

// The mean of the rows: distances stay, norms (and so the error bound) shrink.
void find_centre(const NearestArgs& args) {
  const PackedTable& packed = args.packed;
  std::fill_n(packed.centre, packed.dim, 0.f);
  const int64_t counted = args.vocab - packed.wild[0];
  if (args.dot || counted == 0) return;
  parallel_ranges(args.dim, 16, [&](int64_t begin, int64_t end) {
    Buffer<double> total(end - begin);
    std::fill_n(total.get(), end - begin, 0.0);
    for (int64_t v = 0; v < args.vocab; ++v) {
      if (packed.bias[v] != 0.f) continue;
      for (int64_t k = begin; k < end; ++k) total[k - begin] += at(args.table, args.bf16, v * args.dim + k);
    }
    for (int64_t k = begin; k < end; ++k)
      packed.centre[k] = static_cast<float>(total[k - begin] / static_cast<double>(counted));
  });
}

template <typename Unit>
void pack_group(const NearestArgs& args, int64_t group) {
  const PackedTable& packed = args.packed;
  const int64_t depth = packed.dim / kUnit<Unit>;
  Buffer<float> row(packed.dim);
  Buffer<Unit> rows(kPanel * depth);
  double norm = 0.0, bias = 0.0;
  for (int64_t first = group * packed.columns; first < (group + 1) * packed.columns; first += kPanel) {
    for (int64_t v = first; v < first + kPanel; ++v) {
      std::fill_n(row.get(), packed.dim, 0.f);
      if (v >= args.vocab || packed.bias[v] != 0.f) {
        packed.bias[v] = -kInfinity;
      } else {
        row_to_float(args.table, args.bf16, v, args.dim, row.get());
        for (int64_t k = 0; k < args.dim; ++k) row[k] -= packed.centre[k];
        const double square = squared_norm(row.get(), args.dim);
        const double b = !args.dot ? -0.5 * square : args.bias != nullptr ? at(args.bias, args.bf16, v) : 0.0;
        packed.bias[v] = static_cast<float>(b);
        norm = std::max(norm, std::sqrt(square));
        bias = std::max(bias, std::fabs(b));
      }
      to_units(row.get(), packed.dim, &rows[(v - first) * depth]);
    }
    pack_panel(rows.get(), depth, reinterpret_cast<Unit*>(packed.panels) + first * depth);
  }
  packed.norm[group] = rounded_up(norm);
  packed.slack[group] = rounded_up(bias * sum_error(args.dim) + flush_error(args.dim));
}

// ---- search ----

struct Candidate {
  int32_t id;
  float upper;   // its score is at most this
};

struct Row {
  float share;   // eps = share * norm of the group + slack of the group + own
  float own;
  float lower = -kInfinity;   // the k-th best score is at least this
  int count = 0, known = 0;
  bool everything = false;    // search in float64
  Candidate candidates[kMostCandidates];
  float lows[kNearestMost];   // for k > 1: the highest lower bounds of different columns so far, highest first

  void raise(float low, int k) {
    int i = known < k ? known++ : k - 1;
    if (i == k - 1 && known == k && lower > -kInfinity && low <= lower) return;
    for (; i > 0 && lows[i - 1] < low; --i) lows[i] = lows[i - 1];
    lows[i] = low;
    if (known == k) lower = lows[k - 1];
  }

  void push(int32_t id, float upper) {
    if (count == kMostCandidates) {
      count = static_cast<int>(std::remove_if(candidates, candidates + count, [&](const Candidate& c) {
        return c.upper < lower; }) - candidates);
      everything = count == kMostCandidates;
      if (everything) count = 0;
    }
    candidates[count++] = {id, upper};
  }
};

// Takes a group's scores of one row. What passes the first test is rare.
PDS_INLINE void offer(Row& row, const float* scores, int64_t columns, int64_t first, float norm, float slack) {
  vfloat highest = load(scores);
  for (int64_t j = kWidth; j < columns; j += kWidth) highest = vmax(load(scores + j), highest);
  const float eps = row.share * norm + slack + row.own;
  if (!any_above(highest, row.lower - eps) || row.everything) return;
  row.lower = std::max(row.lower, max(highest) - eps);
  const float least = row.lower - eps;
  for (int64_t j = 0; j < columns; j += kWidth) {
    if (!any_above(load(scores + j), least)) continue;
    for (int64_t i = j; i < j + kWidth; ++i)
      if (scores[i] > least) row.push(static_cast<int32_t>(first + i), scores[i] + eps);
  }
}

// The same for k > 1.
PDS_INLINE void offer_many(Row& row, const float* scores, int64_t columns, int64_t first, float norm, float slack, int k) {
  const float eps = row.share * norm + slack + row.own;
  for (int64_t j = 0; j < columns && !row.everything; j += kWidth) {
    if (!any_above(load(scores + j), row.lower - eps)) continue;
    for (int64_t i = j; i < j + kWidth; ++i) {
      if (!(scores[i] > row.lower - eps)) continue;
      row.raise(scores[i] - eps, k);
      row.push(static_cast<int32_t>(first + i), scores[i] + eps);
    }
  }
}

// The k best of what it has been shown, best first, ties to the lowest id.
struct Ranking {
  int k, known = 0;
  double scores[kNearestMost];
  int64_t ids[kNearestMost];

  void consider(double score, int64_t id) {
    if (score != score) score = -std::numeric_limits<double>::infinity();
    const auto before = [&](int i) { return score > scores[i] || (score == scores[i] && id < ids[i]); };
    if (known == k && !before(k - 1)) return;
    int i = known < k ? known++ : k - 1;
    for (; i > 0 && before(i - 1); --i) scores[i] = scores[i - 1], ids[i] = ids[i - 1];
    scores[i] = score, ids[i] = id;
  }
};

template <typename Engine>
struct Search {
  using Unit = typename Engine::Unit;
  static constexpr int64_t kRows = Engine::kRows;
  const NearestArgs& args;
  const int64_t dim = args.packed.dim, depth = dim / kUnit<Unit>, columns = args.packed.columns;
  int64_t block;   // rows of a task, at most kMostRows

  explicit Search(const NearestArgs& a) : args(a) {
    const int64_t fair = round_up(args.rows / (2 * num_threads()) + 1, kRows);
    block = std::max<int64_t>(kRows, std::min<int64_t>(kMostRows / kRows * kRows, fair));
  }

  // Row r, less the centre, in units at `out`, and its error bound.
  void prepare(int64_t r, Unit* out, float* scratch, Row& row) const {
    std::fill_n(scratch, dim, 0.f);
    row_to_float(args.x, args.bf16, r, args.dim, scratch);
    row.everything = !(std::sqrt(squared_norm(scratch, args.dim)) < kHuge);
    if (row.everything) std::fill_n(scratch, dim, 0.f);
    for (int64_t k = 0; k < args.dim; ++k) scratch[k] -= args.packed.centre[k];
    const double norm = std::sqrt(squared_norm(scratch, args.dim));
    row.share = rounded_up(norm * relative_error<Unit>(args.dim) + flush_error(args.dim));
    row.own = rounded_up(flush_error(args.dim) * (1.0 + norm));
    to_units(scratch, dim, out);
  }

  // The score in float64, by the definition: minus the squared distance, or the product.
  double exact(const float* x, int64_t v) const {
    double lanes[8] = {};
    const int64_t n = args.dim, base = v * n;
    const auto term = [&](int64_t k) {
      const double e = at(args.table, args.bf16, base + k), difference = x[k] - e;
      return args.dot ? x[k] * e : -difference * difference;
    };
    int64_t k = 0;
    for (; k + 8 <= n; k += 8)
      for (int i = 0; i < 8; ++i) lanes[i] += term(k + i);
    for (int i = 0; k < n; ++k, ++i) lanes[i] += term(k);
    double total = 0.0;
    for (double lane : lanes) total += lane;
    return args.dot && args.bias != nullptr ? total + at(args.bias, args.bf16, v) : total;
  }

  int64_t decide(int64_t r, const Row& row, float* x) const {
    const int32_t wild = args.packed.wild[0];
    const auto possible = [&](const Candidate& c) { return c.upper >= row.lower; };
    const Candidate *begin = row.candidates, *end = begin + row.count;
    if (!row.everything && wild == 0 && std::count_if(begin, end, possible) == 1)
      return std::find_if(begin, end, possible)->id;
    double best = -std::numeric_limits<double>::infinity();
    int64_t id = 0;
    row_to_float(args.x, args.bf16, r, args.dim, x);
    const auto consider = [&](int64_t v) {
      const double score = exact(x, v);
      if (score > best || (score == best && v < id)) best = score, id = v;
    };
    if (row.everything) {
      for (int64_t v = 0; v < args.vocab; ++v) consider(v);
      return id;
    }
    for (const Candidate* c = begin; c != end; ++c)
      if (possible(*c)) consider(c->id);
    for (int32_t i = 1; i <= wild; ++i) consider(args.packed.wild[i]);
    return id;
  }

  void decide_many(int64_t r, const Row& row, float* x) const {
    const int64_t k = args.k;
    Ranking ranking;
    ranking.k = static_cast<int>(k);
    row_to_float(args.x, args.bf16, r, args.dim, x);
    const auto consider = [&](int64_t v) { ranking.consider(exact(x, v), v); };
    if (row.everything) {
      for (int64_t v = 0; v < args.vocab; ++v) consider(v);
    } else {
      for (const Candidate* c = row.candidates; c != row.candidates + row.count; ++c)
        if (c->upper >= row.lower) consider(c->id);
      for (int32_t i = 1; i <= args.packed.wild[0]; ++i) consider(args.packed.wild[i]);
    }
    std::copy_n(ranking.ids, k, args.ids + r * k);
    std::copy_n(ranking.scores, k, args.scores + r * k);
  }

  void filter(const Unit* x, int64_t count, Row* rows) const {
    [[maybe_unused]] const typename Engine::Session session;
    alignas(64) float scores[kRows * kNearestColumns];
    const PackedTable& packed = args.packed;
    const int64_t step = std::max<int64_t>(1, kTableBytes / (columns * depth * static_cast<int64_t>(sizeof(Unit))));
    const Unit* panels = reinterpret_cast<const Unit*>(packed.panels);
    for (int64_t begin = 0; begin < packed.groups; begin += step) {
      const int64_t end = std::min(begin + step, packed.groups);
      for (int64_t r = 0; r < count; r += kRows) {
        for (int64_t g = begin; g < end; ++g) {
          Engine::product(depth, columns / kPanel, {x + r * depth, depth, 1}, panels + g * columns * depth,
                          depth * kPanel, kPanel, {packed.bias + g * columns, 0}, scores, columns);
          for (int64_t i = r; i < std::min(r + kRows, count); ++i) {
            const float* row = scores + (i - r) * columns;
            if (args.k == 1) offer(rows[i], row, columns, g * columns, packed.norm[g], packed.slack[g]);
            else offer_many(rows[i], row, columns, g * columns, packed.norm[g], packed.slack[g], static_cast<int>(args.k));
          }
        }
      }
    }
  }

  void task(int64_t first) const {
    const int64_t count = std::min(block, args.rows - first), size = args.bf16 ? 2 : 4;
    Buffer<Unit> x(round_up(count, kRows) * depth);
    std::memset(&x[count * depth], 0, (round_up(count, kRows) - count) * depth * sizeof(Unit));
    Buffer<float> scratch(dim);
    Buffer<Row> rows(count);
    for (int64_t r = 0; r < count; ++r) {
      new (&rows[r]) Row;
      prepare(first + r, &x[r * depth], scratch.get(), rows[r]);
    }
    filter(x.get(), count, rows.get());
    for (int64_t r = first; r < first + count; ++r) {
      if (args.scores != nullptr) {
        decide_many(r, rows[r - first], scratch.get());
        continue;
      }
      args.ids[r] = decide(r, rows[r - first], scratch.get());
      std::memcpy(static_cast<char*>(args.embeddings) + r * args.dim * size,
                  static_cast<const char*>(args.table) + args.ids[r] * args.dim * size, args.dim * size);
    }
  }

  void run() const {
    parallel_for((args.rows + block - 1) / block, [&](int64_t i) { task(i * block); });
  }
};

#if defined(__AVX512BF16__)
using FilterUnit = Bf16Pair;
#else
using FilterUnit = float;
#endif

}  // namespace

void nearest_pack(const NearestArgs& args) {
  find_wild(args);
  find_centre(args);
  parallel_for(args.packed.groups, [&](int64_t g) { pack_group<FilterUnit>(args, g); });
}

void nearest_search(const NearestArgs& args) {
#if PDS_AMX
  if (active_isa() == Isa::amx) return Search<AmxEngine>(args).run();
#endif
  Search<FmaEngine<FilterUnit>>(args).run();
}

}  // namespace PDS_ISA
}  // namespace pds
