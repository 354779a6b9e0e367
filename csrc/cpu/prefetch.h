// Rows in memory that something will read or write soon, fetched a cache line at a time from inside a product: the product
// keeps the arithmetic units busy and leaves the memory idle, and rows of one head lie too far apart for the processor to
// foresee them.
#pragma once
#include <algorithm>
#include <cstdint>

namespace pds {
namespace PDS_ISA {

constexpr int64_t kLine = 64;

class Prefetch {
 public:
  // A walk over lines: `per_row` neighbouring ones, then on by `jump` to the next row.
  struct Walk {
    const char* at;
    int64_t jump, per_row;
  };

  void clear() { size_ = next_ = 0; }

  // `rows` rows of `bytes`, `stride` bytes apart.
  void add(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
    if (first == nullptr || size_ == kMost) return;
    const int64_t lines = (bytes + kLine - 1) / kLine;
    parts_[size_++] = {{static_cast<const char*>(first), stride - lines * kLine, lines}, rows};
  }

  // The next `lines` lines in whole rows. The walk may reach past the last row (which is harmless), and stands still on
  // `idle` when nothing is left.
  Walk take(int64_t lines, const void* idle) {
    if (next_ == size_) return {static_cast<const char*>(idle), -kLine, 1};
    Part& part = parts_[next_];
    const Walk walk = part.walk;
    const int64_t rows = std::max<int64_t>(1, lines / walk.per_row);
    part.walk.at += rows * (walk.jump + walk.per_row * kLine);
    part.rows -= rows;
    if (part.rows <= 0) ++next_;
    return walk;
  }

 private:
  struct Part {
    Walk walk;
    int64_t rows;
  };
  static constexpr int kMost = 12;
  Part parts_[kMost];
  int size_ = 0, next_ = 0;
};

}  // namespace PDS_ISA
}  // namespace pds
