// What the forward and the backward of timestep attention share on CUDA.
//
// A block of 4 warps owns 64 rows of one head, 16 a warp, and walks over tiles of the other side, two in flight. Scores
// are q . k + q . tau, both products in float32 (k + tau is never rounded), plus the key's term
// scale (u . k + w . tau), which also carries the mask (-inf). Keys that the mask removes are not read; they are zeros.
// Scores are kept in units of log 2.
#pragma once
#include "common/philox.h"
#include "cuda/mma.cuh"
#include "cuda/timestep_attention.h"

namespace pds {
namespace cuda {

constexpr int kAttentionThreads = 128;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rows of the tiles that a block walks over: fewer where the head is wide, for shared memory and registers.
template <int D>
constexpr int kWalk = D <= 64 ? 64 : 32;

// One head of one sentence, and the block's place in it.
struct Head {
  int64_t b, h;
  int tile;
  __device__ __forceinline__ Head(int heads, int tiles) {
    const unsigned head = blockIdx.x / tiles;
    tile = static_cast<int>(blockIdx.x % tiles);
    b = head / heads;
    h = head % heads;
  }
};

template <typename T>
__device__ __forceinline__ const T* row_of(const HeadTensor& t, const Head& head, int64_t token) {
  return static_cast<const T*>(t.data) + head.b * t.batch + token * t.token + head.h * t.head;
}

// Copies rows first .. first + kRows - 1 of a head into a tile; zeros behind the last row and the last feature.
template <typename T, int D, int kRows>
__device__ __forceinline__ void load_rows(SharedAddress tile, const HeadTensor& t, const Head& head, int first, int64_t rows,
                                          int64_t dim) {
#pragma unroll
  for (int i = threadIdx.x; i < kRows * Tile<D>::kUnits; i += kAttentionThreads) {
    const int r = i / Tile<D>::kUnits, unit = i % Tile<D>::kUnits;
    const bool valid = first + r < rows && unit * 8 < dim;
    copy_async(tile + Tile<D>::offset(r, unit), row_of<T>(t, head, valid ? first + r : 0) + (valid ? unit * 8 : 0), valid);
  }
}

__device__ __forceinline__ bool kept(const TimestepAttentionArgs& a, const Head& head, int64_t key) {
  return key < a.keys && (a.key_mask == nullptr || __ldg(a.key_mask + head.b * a.keys + key) != 0);
}

// Two stages of kBytes each: while use(stage, i) works on tile i, the copies of load(stage, i + 1) are under way. The copies
// that the block has issued before are complete, and visible, from the first use on. meanwhile() runs while the first tile
// is under way and says whether to go on at all.
template <int kBytes, typename Load, typename Meanwhile, typename Use>
__device__ __forceinline__ void walk_tiles(unsigned char* stages, int tiles, const Load& load, const Meanwhile& meanwhile,
                                           const Use& use) {
  if (tiles > 0) load(stages, 0);
  commit_copies();
  if (meanwhile()) {
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      if (i + 1 < tiles) load(stages + ((i + 1) & 1) * kBytes, i + 1);
      commit_copies();
      wait_copies<1>();
      __syncthreads();
      use(stages + (i & 1) * kBytes, i);
      __syncthreads();   // before the next copies into this stage
    }
  }
  wait_copies<0>();
}

// Tiles of k, tau and v side by side.
template <int D, int kRows>
struct KeyTiles {
  static constexpr int kBytes = 3 * Tile<D>::bytes(kRows);
  SharedAddress k, tau, v;
  __device__ __forceinline__ explicit KeyTiles(SharedAddress start)
      : k(start), tau(start + Tile<D>::bytes(kRows)), v(start + 2 * Tile<D>::bytes(kRows)) {}
};

template <typename T, int D, int kRows>
__device__ __forceinline__ void load_keys(const KeyTiles<D, kRows>& tiles, const TimestepAttentionArgs& a, const Head& head,
                                          int first) {
#pragma unroll
  for (int i = threadIdx.x; i < kRows * Tile<D>::kUnits; i += kAttentionThreads) {
    const int r = i / Tile<D>::kUnits, unit = i % Tile<D>::kUnits, at = Tile<D>::offset(r, unit);
    // Not after a look at the mask: so the two loads are under way together.
    const int64_t timestep = a.timesteps != nullptr && first + r < a.keys ? __ldg(a.timesteps + head.b * a.keys + first + r) : 0;
    const bool valid = kept(a, head, first + r) && unit * 8 < a.dim;
    const int64_t key = valid ? first + r : 0, feature = valid ? unit * 8 : 0;
    copy_async(tiles.k + at, row_of<T>(a.k, head, key) + feature, valid);
    copy_async(tiles.v + at, row_of<T>(a.v, head, key) + feature, valid);
    if (a.tau.data == nullptr) continue;
    const int64_t row = a.timesteps == nullptr ? key : timestep;
    const bool there = valid && (a.timesteps == nullptr || inside(row, a.table_rows));
    copy_async(tiles.tau + at, row_of<T>(a.tau, head, there ? row : 0) + feature, there);
  }
}

// u and w of the head as float: u, then w; zeros where absent.
template <typename T, int D>
__device__ __forceinline__ void load_biases(float* biases, const TimestepAttentionArgs& a, const Head& head) {
  for (int i = threadIdx.x; i < 2 * D; i += kAttentionThreads) {
    const T* bias = static_cast<const T*>(i < D ? a.u : a.w);
    const int d = i % D;
    biases[i] = bias != nullptr && d < a.dim ? widen(bias[head.h * a.dim + d]) : 0.f;
  }
}

template <typename T>
__device__ __forceinline__ float dot_unit(const unsigned char* unit, const float* weights) {
  const uint4 raw = *reinterpret_cast<const uint4*>(unit);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = Mma<T>::unpack(words[i]);
    sum += x.x * weights[2 * i] + x.y * weights[2 * i + 1];
  }
  return sum;
}

// terms[r] = scale (u . k + w . tau) of the keys in the tiles, in units of log 2; -inf for removed keys, NaN where the
// timestep is outside the table. Returns whether this thread saw a key that is kept.
template <typename T, int D, int kRows>
__device__ __forceinline__ bool key_terms(const unsigned char* tiles, const float* biases, const TimestepAttentionArgs& a,
                                          const Head& head, int first, float scale, float* terms) {
  constexpr int kLanes = kAttentionThreads / kRows;   // per key
  const int r = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float sum = 0.f;
  if (a.u != nullptr || a.w != nullptr) {
#pragma unroll
    for (int unit = lane; unit < Tile<D>::kUnits; unit += kLanes) {
      const unsigned char* at = tiles + Tile<D>::offset(r, unit);
      sum += dot_unit<T>(at, biases + 8 * unit);
      if (a.tau.data != nullptr) sum += dot_unit<T>(at + Tile<D>::bytes(kRows), biases + D + 8 * unit);
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, mask);
  }
  const bool keep = kept(a, head, first + r);
  if (lane == 0) {
    float term = keep ? sum * scale : __int_as_float(0xFF800000);
    if (keep && a.timesteps != nullptr && !inside(__ldg(a.timesteps + head.b * a.keys + first + r), a.table_rows))
      term = __int_as_float(0x7FC00000);
    terms[r] = term;
  }
  return keep;
}

// c[n] += rows (an a-fragment) x the transpose of `columns`, 8 columns per n.
template <typename T, int D, int kColumns>
__device__ __forceinline__ void multiply_transposed(float c[][4], const uint32_t a[4], SharedAddress columns, int k, int lane) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; n += 2) {
    uint32_t b[4];
    Tile<D>::load_b(columns, 8 * n, k, lane, b);
    Mma<T>::multiply(c[n], a, b[0], b[1]);
    Mma<T>::multiply(c[n + 1], a, b[2], b[3]);
  }
}

// c[16][D] += a[16][kDepth] x tile[kDepth][D], with `a` as accumulators that are rounded to 16 bits here.
template <typename T, int D, int kDepth>
__device__ __forceinline__ void multiply_rows(float c[][4], const float a[][4], SharedAddress tile, int lane) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    const float *low = a[2 * k], *high = a[2 * k + 1];
    const uint32_t words[4] = {Mma<T>::pack(low[0], low[1]), Mma<T>::pack(low[2], low[3]), Mma<T>::pack(high[0], high[1]),
                               Mma<T>::pack(high[2], high[3])};
#pragma unroll
    for (int i = 0; i < D / 8; i += 2) {
      uint32_t b[4];
      Tile<D>::load_b_rows(tile, 16 * k, i, lane, b);
      Mma<T>::multiply(c[i], words, b[0], b[1]);
      Mma<T>::multiply(c[i + 1], words, b[2], b[3]);
    }
  }
}

template <int kCount>
__device__ __forceinline__ void clear(float c[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.f;
}

__device__ __forceinline__ float sum_over_quad(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

// Writes a warp's 16 rows of accumulators, times factors[row half], to out + row * stride through its own rows of a tile.
template <typename T, int D>
__device__ __forceinline__ void store_rows(unsigned char* tile, const float c[][4], const float factors[2], T* out,
                                           int64_t stride, int first, int64_t rows, int64_t dim) {
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      uint32_t* at = reinterpret_cast<uint32_t*>(tile + Tile<D>::offset(own + lane / 4 + 8 * e, i)) + lane % 4;
      *at = Mma<T>::pack(c[i][2 * e] * factors[e], c[i][2 * e + 1] * factors[e]);
    }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * Tile<D>::kUnits; i += 32) {
    const int r = own + i / Tile<D>::kUnits, unit = i % Tile<D>::kUnits;
    if (first + r < rows && unit * 8 < dim)
      *reinterpret_cast<uint4*>(out + (first + r) * stride + unit * 8) =
          *reinterpret_cast<const uint4*>(tile + Tile<D>::offset(r, unit));
  }
}

// --- Dropout ---

struct DropoutKey {
  uint32_t key0, key1, threshold, head;
  float factor;   // 1 / (probability of survival)
  __device__ __forceinline__ DropoutKey(const TimestepAttentionArgs& a, const int64_t* device_seed, const Head& at)
      : threshold(a.drop_threshold), head(static_cast<uint32_t>(at.b * a.heads + at.h)),
        factor(1.f / (1.f - static_cast<float>(a.drop_threshold) * kDropUnit)) {
    const uint64_t seed = device_seed == nullptr ? a.seed : static_cast<uint64_t>(__ldg(device_seed));
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
  }
  __device__ __forceinline__ void draw(uint32_t group, uint32_t query, uint32_t words[4]) const {
    words[0] = group, words[1] = kAttentionStream, words[2] = query, words[3] = head;
    philox10(words, key0, key1);
  }
};

// words[i] of lane c of a quad becomes word c of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t words[4], int lane) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int a = mask == 1 ? 2 * i : i, b = a + mask;
      const uint32_t received = __shfl_xor_sync(kWholeWarp, upper ? words[a] : words[b], mask);
      if (upper) words[a] = received;
      else words[b] = received;
    }
  }
}

// Which elements of the warp's accumulator [16 queries][8 kBlocks keys] survive: bit 4 n + e for c[n][e]. A Philox block
// serves 8 keys of a query, the n-th accumulator of a quad: lane c draws the blocks 4 g + c.
template <int kBlocks>
__device__ __forceinline__ uint32_t survivors_by_query(const DropoutKey& key, uint32_t query, uint32_t first_key, int lane) {
  uint32_t bits = 0;
#pragma unroll 1   // in turn: all at once would take too many registers
  for (int half = 0; half < 2; ++half)
#pragma unroll 1
    for (int g = 0; g < kBlocks / 4; ++g) {
      uint32_t words[4];
      key.draw(first_key / 8 + 4 * g + (lane & 3), query + 8 * half, words);
      transpose_quad(words, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * g + i) + 2 * half;
        bits |= ((words[i] & 0xFFFFu) >= key.threshold ? 1u : 0u) << at;
        bits |= ((words[i] >> 16) >= key.threshold ? 1u : 0u) << (at + 1);
      }
    }
  return bits;
}

// The same for [16 keys][8 kBlocks queries]: lane l draws the block of query l % 8 of the accumulator 4 g + l / 8.
template <int kBlocks>
__device__ __forceinline__ uint32_t survivors_by_key(const DropoutKey& key, uint32_t first_query, uint32_t first_key, int lane) {
  uint32_t bits = 0;
#pragma unroll 1   // in turn: all at once would take too many registers
  for (int half = 0; half < 2; ++half)
#pragma unroll 1
    for (int g = 0; g < kBlocks / 4; ++g) {
      uint32_t words[4];
      key.draw(first_key / 8 + half, first_query + 8 * (4 * g + lane / 8) + (lane & 7), words);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int source = 8 * i + 2 * (lane & 3) + e;
          uint32_t word = 0;   // number (lane / 4) / 2 of the source lane
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t candidate = __shfl_sync(kWholeWarp, words[j], source);
            if (j == lane >> 3) word = candidate;
          }
          const uint32_t piece = (lane & 4) != 0 ? word >> 16 : word & 0xFFFFu;
          bits |= (piece >= key.threshold ? 1u : 0u) << (4 * (4 * g + i) + 2 * half + e);
        }
    }
  return bits;
}

// --- Launches ---

template <int kDim>
struct HeadDim {
  static constexpr int value = kDim;
};

// Calls run(zero of the element type, HeadDim of at least dim) and returns its status.
template <typename Run>
cudaError_t for_type_and_dim(FloatType dtype, int64_t dim, Run&& run) {
  const auto for_dim = [&](auto zero) {
    if (dim <= 16) return run(zero, HeadDim<16>{});
    if (dim <= 32) return run(zero, HeadDim<32>{});
    if (dim <= 64) return run(zero, HeadDim<64>{});
    if (dim <= 96) return run(zero, HeadDim<96>{});
    return run(zero, HeadDim<128>{});
  };
  if (dim % 8 != 0 || dim > 128) return cudaErrorInvalidValue;
  if (dtype == FloatType::bfloat16) return for_dim(__nv_bfloat16{});
  if (dtype == FloatType::float16) return for_dim(__half{});
  return cudaErrorInvalidValue;
}

inline int64_t attention_tiles(int64_t rows) { return (rows + kAttentionRows - 1) / kAttentionRows; }

}  // namespace cuda
}  // namespace pds
