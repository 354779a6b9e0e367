// Rows in memory that something will read or write soon, fetched a cache line at a time from inside a product: the product
// keeps the arithmetic units busy and leaves the memory idle, and rows of one head lie too far apart for the processor to
// foresee them.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace pds {
namespace PDS_ISA {

constexpr int64_t kLine = 64;

class Prefetch {
 public:
  // A walk over lines: `left` of this row, then on by `jump` to the next row of `per_row`.
  struct Walk {
    const char* at;
    int64_t left, per_row, jump;
  };

  // Into the second-level cache: the first would run out of places for what is under way.
  static PDS_INLINE void fetch_line(const char* at) { __builtin_prefetch(at, 0, 2); }

  void clear() { size_ = next_ = 0; }
  bool empty() const { return next_ == size_; }
  int64_t lines() const {   // left to fetch
    int64_t sum = 0;
    for (int i = next_; i < size_; ++i) sum += parts_[i].lines;
    return sum;
  }

  // `rows` rows of `bytes`, `stride` bytes apart.
  void add(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
    if (first == nullptr || rows <= 0 || size_ == kMost) return;
    const int64_t lines = (bytes + kLine - 1) / kLine;
    parts_[size_++] = {{static_cast<const char*>(first), lines, lines, stride - lines * kLine}, rows * lines};
  }

  // The next `lines` lines. The walk may reach past the last row (which is harmless), and stands still on `idle` when
  // nothing is left.
  Walk take(int64_t lines, const void* idle) {
    if (next_ == size_) return {static_cast<const char*>(idle), 1, 1, -kLine};
    Part& part = parts_[next_];
    const Walk walk = part.walk;
    const int64_t into_row = walk.per_row - walk.left + lines, rows = into_row / walk.per_row;
    part.walk.at += lines * kLine + rows * walk.jump;
    part.walk.left = walk.per_row - (into_row - rows * walk.per_row);
    part.lines -= lines;
    if (part.lines <= 0) ++next_;
    return walk;
  }

  // Fetches what is left.
  void finish() {
    while (next_ < size_) fetch(parts_[next_].lines);
  }

  // Fetches the next `lines` lines.
  void fetch(int64_t lines) {
    if (next_ == size_) return;
    for (Walk walk = take(lines, nullptr); lines > 0; --lines) {
      fetch_line(walk.at);
      walk.at += kLine;
      if (--walk.left == 0) {
        walk.at += walk.jump;
        walk.left = walk.per_row;
      }
    }
  }

 private:
  struct Part {
    Walk walk;
    int64_t lines;
  };
  static constexpr int kMost = 12;
  Part parts_[kMost];
  int size_ = 0, next_ = 0;
};

}  // namespace PDS_ISA
}  // namespace pds
