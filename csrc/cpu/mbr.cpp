// Pairwise sentence utilities. Every n-gram of a candidate is numbered once; a posting list per n-gram says which
// candidates hold it how often. A row of the matrix then walks the lists of its own n-grams and touches only matches,
// where a loop over pairs would compare every n-gram of both. Numbers, not hashes, are compared, so counts are exact.
// The formulas are those of pydiffseq/metrics/sentence.py, operation by operation.
#include "common/mbr.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"

namespace pds {
namespace PDS_ISA {
namespace {

constexpr int64_t kPairsPerTask = 4096;   // about half a millisecond: waking a thread for less can cost more

struct Entry {
  uint32_t id, times;
};

// Numbers keys in the order in which they first come: open addressing in a table that is never more than half full.
class Numbering {
 public:
  Numbering(int64_t most, uint32_t first) : next_(first) {
    while ((int64_t{1} << bits_) < 2 * most) ++bits_;
    keys_.resize(int64_t{1} << bits_);
    numbers_.assign(keys_.size(), kFree);
  }
  uint32_t operator()(uint64_t key) {
    for (uint64_t at = (key * 0x9E3779B97F4A7C15u) >> (64 - bits_);; at = (at + 1) & (keys_.size() - 1)) {
      if (numbers_[at] == kFree) {
        keys_[at] = key;
        return numbers_[at] = next_++;
      }
      if (keys_[at] == key) return numbers_[at];
    }
  }
  uint32_t size() const { return next_; }

 private:
  static constexpr uint32_t kFree = ~uint32_t{0};
  int bits_ = 4;
  uint32_t next_;
  std::vector<uint64_t> keys_;
  std::vector<uint32_t> numbers_;
};

int64_t length(const MbrArgs& args, int64_t candidate) { return args.offsets[candidate + 1] - args.offsets[candidate]; }

// The n-grams of all candidates, n = 1 .. orders, and for each n-gram the candidates that hold it.
struct Index {
  int64_t orders;
  std::vector<Entry> grams;       // (n-gram, times), candidate by candidate and order by order
  std::vector<int64_t> bounds;    // of candidate c's order n (from 0): [c * orders + n]
  std::vector<Entry> postings;    // (candidate, times), n-gram by n-gram
  std::vector<int64_t> starts;    // of each n-gram's postings

  Index(const MbrArgs& args, int64_t orders) : orders(orders) {
    const uint32_t distinct = number(args);
    starts.assign(distinct + 1, 0);
    for (const Entry& gram : grams) ++starts[gram.id + 1];
    for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
    postings.resize(grams.size());
    std::vector<int64_t> fill(starts.begin(), starts.end() - 1);
    for (int64_t c = 0; c < args.count; ++c)
      for (int64_t i = bounds[c * orders]; i < bounds[(c + 1) * orders]; ++i)
        postings[fill[grams[i].id]++] = {static_cast<uint32_t>(c), grams[i].times};
  }

  // Matches of `row` with every candidate, clipped, order by order: [orders, count].
  void matches(int64_t row, int64_t count, uint32_t* out) const {
    std::fill(out, out + orders * count, 0u);
    for (int64_t n = 0; n < orders; ++n, out += count)
      for (int64_t i = bounds[row * orders + n]; i < bounds[row * orders + n + 1]; ++i) {
        const Entry gram = grams[i];
        for (int64_t p = starts[gram.id]; p < starts[gram.id + 1]; ++p)
          out[postings[p].id] += std::min(gram.times, postings[p].times);
      }
  }

 private:
  // Fills grams and bounds. An n-gram is the pair of its first n - 1 tokens' number and its last token.
  uint32_t number(const MbrArgs& args) {
    const int64_t total = args.offsets[args.count] * orders;
    Numbering numbers(total, static_cast<uint32_t>(args.distinct));
    std::vector<int64_t> slot(total + args.distinct, -1);   // where in grams an n-gram was put last
    std::vector<uint32_t> prefix;
    bounds.reserve(args.count * orders + 1);
    grams.reserve(total);
    for (int64_t c = 0; c < args.count; ++c) {
      const int64_t* tokens = args.tokens + args.offsets[c];
      const int64_t size = length(args, c), own = static_cast<int64_t>(grams.size());
      prefix.assign(tokens, tokens + size);
      for (int64_t n = 0; n < orders; ++n) {
        bounds.push_back(static_cast<int64_t>(grams.size()));
        for (int64_t i = 0; i + n < size; ++i) {
          if (n) prefix[i] = numbers(uint64_t{prefix[i]} << 32 | static_cast<uint64_t>(tokens[i + n]));
          int64_t& at = slot[prefix[i]];
          if (at >= own) {
            ++grams[at].times;
          } else {
            at = static_cast<int64_t>(grams.size());
            grams.push_back({prefix[i], 1});
          }
        }
      }
    }
    bounds.push_back(static_cast<int64_t>(grams.size()));
    return numbers.size();
  }
};

// One pair's n-gram matches: of(n) for n = 1, 2, ...; lengths of hypothesis and reference, both above 0.
struct Matches {
  const uint32_t* first;
  int64_t stride;
  int64_t hypothesis, reference;
  double of(int64_t n) const { return first[(n - 1) * stride]; }
};

double bleu(const Matches& m, BleuSmoothing smoothing) {
  const bool add1 = smoothing == BleuSmoothing::add1, all = smoothing == BleuSmoothing::add1_all;
  const bool method4 = smoothing == BleuSmoothing::method4;
  if (m.of(1) == 0 && !all) return 0.0;
  const double size = static_cast<double>(m.hypothesis);
  const int64_t orders = all || method4 ? 4 : std::min<int64_t>(4, m.hypothesis);
  double matched = 1.0, counted = 1.0, halved = 1.0;
  for (int64_t n = 1; n <= orders; ++n) {
    const double hits = m.of(n), total = std::max(size - n + 1, 0.0);
    if (all || (add1 && n > 1)) {
      matched *= hits + 1, counted *= total + 1;
    } else if (hits > 0) {
      matched *= hits, counted *= total;
    } else if (!method4) {
      halved *= 2, counted *= halved * total;
    } else if (m.hypothesis > 1) {
      halved *= 2, matched *= std::log(size), counted *= halved * 5 * std::max(total, 1.0);
    }
  }
  const double brevity = std::min(0.0, 1.0 - static_cast<double>(m.reference) / size);
  return std::exp(std::log(matched / counted) / static_cast<double>(orders) + brevity);
}

double chrf(const Matches& m) {
  double precision = 0.0, recall = 0.0;
  for (int64_t n = 1; n <= std::min<int64_t>(6, std::min(m.hypothesis, m.reference)); ++n) {
    precision += m.of(n) / static_cast<double>(m.hypothesis - n + 1);
    recall += m.of(n) / static_cast<double>(m.reference - n + 1);
  }
  if (precision == 0.0) return 0.0;
  const double orders = static_cast<double>(std::min<int64_t>(6, std::min(m.hypothesis, m.reference)));
  precision /= orders, recall /= orders;
  return 5.0 * precision * recall / (4.0 * precision + recall);
}

double f1(const Matches& m) { return 2.0 * m.of(1) / static_cast<double>(m.hypothesis + m.reference); }

template <typename Pair>   // Pair: (row, column) -> utility of two candidates with tokens
void fill_row(const MbrArgs& args, int64_t row, Pair&& pair) {
  for (int64_t j = 0; j < args.count; ++j) {
    double* out = args.utility + row * args.count + j;
    const bool no_row = length(args, row) == 0, no_column = length(args, j) == 0;
    *out = no_row || no_column ? static_cast<double>(no_row && no_column) : pair(j);
  }
}

int64_t grain(const MbrArgs& args) { return std::max<int64_t>(1, kPairsPerTask / args.count); }

void ngram_utilities(const MbrArgs& args) {
  const int64_t orders = args.metric == Utility::bleu ? 4 : args.metric == Utility::chrf ? 6 : 1;
  const Index index(args, orders);
  parallel_ranges(args.count, grain(args), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> counts(orders * args.count);
    for (int64_t row = begin; row < end; ++row) {
      index.matches(row, args.count, counts.data());
      fill_row(args, row, [&](int64_t j) {
        const Matches m{counts.data() + j, args.count, length(args, row), length(args, j)};
        return args.metric == Utility::bleu ? bleu(m, args.smoothing) : args.metric == Utility::chrf ? chrf(m) : f1(m);
      });
    }
  });
}

// Levenshtein distances from one pattern: the columns of the table as bits, 64 rows a word (Myers 1999, Hyyro 2003).
class Distances {
 public:
  explicit Distances(int64_t distinct) : distinct_(distinct) {}

  void set_pattern(const int64_t* tokens, int64_t size) {
    size_ = size, words_ = (size + 63) / 64;
    where_.assign(distinct_ * words_, 0);
    for (int64_t i = 0; i < size; ++i) where_[tokens[i] * words_ + i / 64] |= uint64_t{1} << (i % 64);
  }

  int64_t to(const int64_t* tokens, int64_t size) {
    up_.assign(words_, ~uint64_t{0});
    down_.assign(words_, 0);
    int64_t distance = size_;
    for (int64_t i = 0; i < size; ++i) distance += column(where_.data() + tokens[i] * words_);
    return distance;
  }

 private:
  int column(const uint64_t* equal) {   // the change of the last row
    int carry = 1;                      // the first row of the table counts insertions
    for (int64_t w = 0; w < words_; ++w) {
      const uint64_t last = uint64_t{1} << (w + 1 < words_ ? 63 : (size_ - 1) % 64);
      const uint64_t below = uint64_t{carry < 0}, up = up_[w], down = down_[w];
      const uint64_t vertical = equal[w] | down, same = equal[w] | below;
      const uint64_t horizontal = (((same & up) + up) ^ up) | same;
      uint64_t plus = down | ~(horizontal | up), minus = up & horizontal;
      const int out = (plus & last ? 1 : 0) - (minus & last ? 1 : 0);
      plus = plus << 1 | uint64_t{carry > 0}, minus = minus << 1 | below;
      up_[w] = minus | ~(vertical | plus), down_[w] = plus & vertical;
      carry = out;
    }
    return carry;
  }

  int64_t distinct_, size_ = 0, words_ = 0;
  std::vector<uint64_t> where_;       // [distinct, words]: the places of a token in the pattern
  std::vector<uint64_t> up_, down_;   // vertical differences of +1 and -1
};

void edit_utilities(const MbrArgs& args) {
  parallel_ranges(args.count, grain(args), [&](int64_t begin, int64_t end) {
    Distances distances(args.distinct);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t size = length(args, row);
      distances.set_pattern(args.tokens + args.offsets[row], size);
      fill_row(args, row, [&](int64_t j) {
        const double longest = static_cast<double>(std::max(size, length(args, j)));
        return 1.0 - static_cast<double>(distances.to(args.tokens + args.offsets[j], length(args, j))) / longest;
      });
    }
  });
}

}  // namespace

void mbr_utilities(const MbrArgs& args) { args.metric == Utility::edit ? edit_utilities(args) : ngram_utilities(args); }

}  // namespace PDS_ISA
}  // namespace pds
