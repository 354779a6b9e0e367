// Sizes of the tiles in which rows meet a table (row_tiles.cuh), for launchers and bindings.
#pragma once
#include <cstdint>

namespace pds {
namespace cuda {

constexpr int kTileRows = 128;       // rows of x, and of the table, of a tile
constexpr int kTileFeatures = 64;    // features that are in hand at once: a chunk

// Into how many parts the table's `tiles` are split so that the device has enough blocks; negative: minus a CUDA error.
int64_t tile_parts(int64_t rows, int64_t tiles, int device);

}  // namespace cuda
}  // namespace pds
