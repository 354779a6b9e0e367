// Exact nearest rows of a table: a fast product finds the few candidates that rounding leaves possible, float64 decides.
#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace pds {

// A table made ready for the search. Its layout depends on the instruction set that packed it.
struct PackedTable {
  int64_t groups, columns, dim;   // the table is padded to groups * columns rows and dim features
  uint32_t* panels;   // [groups * columns * dim] words (half of them used for bfloat16 pairs)
  float* bias;        // [groups * columns] added to x . e: -|e|^2 / 2 (L2), the caller's bias or 0 (dot); -inf: never
  float* norm;        // [groups] largest |e|
  float* slack;       // [groups] part of the error bound that does not depend on x
  float* centre;      // [dim] subtracted from x and e (L2; zeros for dot)
  int32_t* wild;      // [vocab + 1] count, then the rows that the product cannot take: not finite, or huge
};

struct NearestArgs {
  const void* x;        // [rows, dim]
  const void* table;    // [vocab, dim]
  const void* bias;     // [vocab] or null
  bool bf16;            // the floating-point type of x, table and bias
  bool dot;             // largest x . e + bias instead of smallest |x - e|
  int64_t rows, vocab, dim;
  PackedTable packed;
  int64_t k;            // how many rows of the table, 1..kNearestMost
  int64_t* ids;         // [rows, k], best first
  double* scores;       // [rows, k] or null: minus the squared distance, or the product plus bias; -inf for NaN
  void* embeddings;     // [rows, dim] = table[ids], or null; only with k = 1
};

PDS_DISPATCH(nearest_pack, NearestArgs)
PDS_DISPATCH(nearest_search, NearestArgs)

constexpr int64_t kNearestColumns = 128;   // rows of the table per group
constexpr int64_t kNearestFeatures = 32;   // dim is padded to a multiple
constexpr int kNearestMost = 16;

}  // namespace pds
