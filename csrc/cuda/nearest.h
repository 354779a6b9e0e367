// Launcher of the exact nearest-row search on CUDA; see common/nearest.h for what it computes.
#pragma once
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/row_tiles.h"

namespace pds {
namespace cuda {

constexpr int kNearestSlots = 8;      // per row and part of the table
constexpr double kNearestHuge = 2305843009213693952.0;   // 2^61: products of two such norms still fit float32

// Candidates of one row among the columns that one thread sees: the highest bounds of groups of 16 columns.
struct NearestSlot {
  float first, second, third;   // upper bounds of a group's best score, highest first
  float lower;                  // some score is at least this
  uint32_t groups;              // those of the first (low half) and the second; a group: 64 columns, 16 of them the thread's
};
constexpr int64_t kNearestMostTiles = 32767;   // so that groups have 16 bits and one value is left for none

struct NearestCudaArgs {
  const void *x, *table, *bias;   // [rows, dim], [vocab, dim], [vocab] or null; of Launch's type
  bool dot;
  int64_t rows, vocab, dim;
  // The table made ready: bfloat16 [tiles * 128, padded] less the centre, added to x . e (-inf: never), per tile the largest
  // norm and the part of the error that does not depend on x, [dim] the centre, and the count and ids of rows that the
  // product cannot take.
  const void* packed;
  const float *packed_bias, *norm, *slack, *centre;
  const int32_t* wild;
  int64_t tiles, padded, parts;   // padded: dim, to a multiple of kTileFeatures; parts: tile_parts()
  void* rows16;                   // workspace: bfloat16 [rows, padded]
  float* margins;                 // workspace: [rows, 2]
  NearestSlot* slots;             // workspace: [rows, parts, kNearestSlots]
  int64_t k;                      // 1..32
  int64_t* ids;                   // [rows, k], best first
  float* scores;                  // [rows, k], or null: then k is 1, and
  void* embeddings;               // [rows, dim] = table[ids]
};

Status nearest_search(const NearestCudaArgs& args, const Launch& launch);

}  // namespace cuda
}  // namespace pds
