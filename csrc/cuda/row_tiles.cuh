// Scores of rows against the rows of a table, x . e + b, tile by tile on the tensor cores: what the nearest-row search and the
// cross-entropy of a linear layer share. A tile's scores stay in registers; the caller folds them into what it keeps.
//
// Memory holds chunks: 64 features of up to 128 rows (mma.cuh's Tile). A block of 8 warps makes 128 rows at a time; warp w has
// rows 32 (w % 4) .. + 31 and the half w / 4 of the columns. scores[i][n] is the accumulator of rows 16 i .. + 15 and columns
// 8 n .. + 7 of the warp's.
#pragma once
#include "cuda/mma.cuh"
#include "cuda/row_tiles.h"

namespace pds {
namespace cuda {

constexpr int kTileThreads = 256;
using Chunk = Tile<kTileFeatures>;
constexpr int kChunkBytes = Chunk::bytes(kTileRows);

// Where a thread's scores are, where a warp has kColumns columns. Row i (0..3) of a thread is row(i); its accumulators are
// scores[i / 2][n][2 (i % 2)] and the next, at column(n) and the next.
template <int kColumns>
struct TilePlace {
  int lane, first_row, first_column;
  __device__ __forceinline__ TilePlace()
      : lane(threadIdx.x % 32), first_row(threadIdx.x / 32 % 4 * 32), first_column(threadIdx.x / 128 * kColumns) {}
  __device__ __forceinline__ int row(int i) const { return first_row + lane / 4 + 8 * i; }
  __device__ __forceinline__ int column(int n) const { return first_column + 8 * n + 2 * (lane & 3); }
};

// A matrix of 16-bit rows. `stride` and the address are multiples of 8 elements; what lies behind `stride` reads as 0.
// kPadded: it has whole tiles of whole chunks.
template <typename T, bool kPadded = false>
struct RowMatrix {
  const T* data;
  int64_t rows;
  int stride;
  __device__ __forceinline__ int chunks() const { return (stride + kTileFeatures - 1) / kTileFeatures; }
};

// Chunk `chunk` of kRows rows from `first` on; rows that do not exist are zeros.
template <int kRows, typename T, bool kPadded>
__device__ __forceinline__ void load_chunk(SharedAddress tile, const RowMatrix<T, kPadded>& matrix, int64_t first, int chunk) {
  const int r = threadIdx.x / Chunk::kUnits, unit = threadIdx.x % Chunk::kUnits;
  constexpr int kStep = kTileThreads / Chunk::kUnits;   // rows
  const int feature = chunk * kTileFeatures + unit * 8;
  int rows = kRows;
  if (!kPadded) rows = feature < matrix.stride ? static_cast<int>(min(matrix.rows - first, int64_t{kRows})) : 0;
  const T* from = matrix.data + first * matrix.stride + (r * matrix.stride + feature);
  tile += Chunk::offset(r, unit);
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const bool valid = kPadded || r + i * kStep < rows;
    copy_async(tile + Chunk::offset(i * kStep, 0), valid ? from + i * kStep * matrix.stride : matrix.data, valid);
  }
}

// The scores' start: b of the table's rows that are the columns.
template <int kColumns>
__device__ __forceinline__ void start_scores(float scores[2][kColumns / 8][4], const float* bias, const TilePlace<kColumns>& at) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    const float2 b = __ldg(reinterpret_cast<const float2*>(bias + at.column(n)));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scores[i][n][0] = scores[i][n][2] = b.x;
      scores[i][n][1] = scores[i][n][3] = b.y;
    }
  }
}

// The same where b belongs to the rows.
__device__ __forceinline__ void start_scores_by_row(float scores[2][4][4], const float* bias, const TilePlace<32>& at) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float b = __ldg(bias + at.row(i));
#pragma unroll
    for (int n = 0; n < 4; ++n) scores[i / 2][n][2 * (i % 2)] = scores[i / 2][n][2 * (i % 2) + 1] = b;
  }
}

// scores += left . right over the features of a chunk.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_chunk(float scores[2][kColumns / 8][4], SharedAddress left, SharedAddress right,
                                               const TilePlace<kColumns>& at) {
#pragma unroll 1   // 128 registers, so that two blocks share a processor
  for (int k = 0; k < kTileFeatures / 16; ++k) {
    uint32_t rows[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) Chunk::load_a(left, at.first_row + 16 * i, k, at.lane, rows[i]);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t columns[4];
      Chunk::load_b(right, at.first_column + 8 * n, k, at.lane, columns);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Mma<T>::multiply(scores[i][n], rows[i], columns[0], columns[1]);
        Mma<T>::multiply(scores[i][n + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

// A block's share of a grid of (tiles of rows) * parts blocks: 128 rows, and tiles [tile, end_tile) of the table, which has
// `tiles` of them.
struct BlockShare {
  int64_t first_row;
  int rows, part, tile, end_tile;
  __device__ __forceinline__ BlockShare(int64_t all_rows, int64_t tiles, int64_t parts) {
    const unsigned row_tiles = static_cast<unsigned>((all_rows + kTileRows - 1) / kTileRows);
    const int tiles_per_part = static_cast<int>((tiles + parts - 1) / parts);
    part = blockIdx.x / row_tiles;
    first_row = static_cast<int64_t>(blockIdx.x % row_tiles) * kTileRows;
    rows = static_cast<int>(min(all_rows - first_row, static_cast<int64_t>(kTileRows)));
    tile = part * tiles_per_part;
    end_tile = min(static_cast<int>(tiles), tile + tiles_per_part);
  }
};

// Where the walk over tiles and their chunks is.
struct TileWalk {
  int tile, chunk = 0;
  __device__ __forceinline__ void advance(int chunks) {
    if (++chunk == chunks) chunk = 0, ++tile;
  }
};

// Shared memory of walk_tiles.
constexpr int64_t walk_bytes(bool resident, int stages, int64_t chunks) {
  return (resident ? chunks + stages : 2 * stages) * kChunkBytes;
}

// Calls take(tile, scores) for each of the share's tiles. kResident: all chunks of x stay in shared memory; else they stream
// along with those of the table. `bias` has 128 entries for every tile; a tile's rows that do not exist want -inf there.
template <typename T, bool kResident, int kStages, bool kPadded, typename Take>
__device__ __forceinline__ void walk_tiles(SharedAddress memory, const RowMatrix<T>& x, const RowMatrix<T, kPadded>& table,
                                           const float* bias, const BlockShare& share, const TilePlace<64>& at, Take&& take) {
  constexpr int kStageBytes = (kResident ? 1 : 2) * kChunkBytes;
  const int chunks = table.chunks();
  const SharedAddress stages = memory + (kResident ? chunks * kChunkBytes : 0);
  TileWalk ahead{share.tile}, now = ahead;
  const auto load = [&](int stage) {
    if (ahead.tile < share.end_tile) {
      const SharedAddress place = stages + stage * kStageBytes;
      load_chunk<kTileRows>(place, table, static_cast<int64_t>(ahead.tile) * kTileRows, ahead.chunk);
      if (!kResident) load_chunk<kTileRows>(place + kChunkBytes, x, share.first_row, ahead.chunk);
      ahead.advance(chunks);
    }
    commit_copies();
  };
  if (kResident)
    for (int chunk = 0; chunk < chunks; ++chunk)
      load_chunk<kTileRows>(memory + chunk * kChunkBytes, x, share.first_row, chunk);
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);

  float scores[2][8][4];
  int stage = 0;
#pragma unroll 1
  for (; now.tile < share.end_tile; now.advance(chunks)) {
    if (now.chunk == 0) start_scores<64>(scores, bias + now.tile * kTileRows, at);
    wait_copies<kStages - 2>();
    __syncthreads();   // the chunk is there for all, and the stage before it is free
    load(stage == 0 ? kStages - 1 : stage - 1);
    const SharedAddress place = stages + stage * kStageBytes;
    multiply_chunk<T, 64>(scores, kResident ? memory + now.chunk * kChunkBytes : place + kChunkBytes, place, at);
    if (now.chunk + 1 == chunks) take(now.tile, scores);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_copies<0>();
}

}  // namespace cuda
}  // namespace pds
