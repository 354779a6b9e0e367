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

// ptxas for sm_100 keeps more in registers: there a kernel is asked for a block fewer on a processor, so that none spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFewerBlocks = 1;
#else
constexpr int kFewerBlocks = 0;
#endif

// Rows of the tiles that a block walks over: fewer where the head is wide, for shared memory and registers.
template <int D>
constexpr int kWalk = D <= 64 ? 64 : 32;

__host__ __device__ inline int64_t attention_tiles(int64_t rows) { return (rows + kAttentionRows - 1) / kAttentionRows; }

// One head of one sentence, the block's place in it, and where the sentence lies. Numbers of tokens fit into 31 bits.
struct Head {
  int b, h, tile, queries, keys;
  int first_query, first_key;   // tokens before this sentence
  __device__ __forceinline__ Head(const TimestepAttentionArgs& a, int64_t rows, unsigned block = blockIdx.x)
      : queries(static_cast<int>(a.queries)), keys(static_cast<int>(a.keys)) {
    const unsigned tiles = static_cast<unsigned>(attention_tiles(rows)), head = block / tiles;
    tile = static_cast<int>(block % tiles);
    b = static_cast<int>(head / static_cast<unsigned>(a.heads));
    h = static_cast<int>(head % static_cast<unsigned>(a.heads));
    first_query = b * queries, first_key = b * keys;
    if (a.query_offsets == nullptr) return;
    first_query = static_cast<int>(__ldg(a.query_offsets + b));
    first_key = static_cast<int>(__ldg(a.key_offsets + b));
    queries = min(queries, static_cast<int>(__ldg(a.query_offsets + b + 1)) - first_query);
    keys = min(keys, static_cast<int>(__ldg(a.key_offsets + b + 1)) - first_key);
  }
  // For loops over tiles, which have no registers to spare for addresses.
  __device__ __forceinline__ Head anew() const {
    Head head = *this;
    head.b = computed_anew(b);
    head.h = computed_anew(h);
    return head;
  }
  // Of a row's log-sum-exp or delta.
  __device__ __forceinline__ int64_t sum_at(int64_t heads, int row) const {
    return first_query * heads + static_cast<int64_t>(h) * queries + row;
  }
};

// The rows of a head, `stride` elements apart.
template <typename T>
struct Rows {
  const T* start;
  int64_t stride;
  int count;
  __device__ __forceinline__ const T* operator[](int row) const { return start + row * stride; }
};
template <typename T>
__device__ __forceinline__ Rows<T> rows_of(const HeadTensor& t, const Head& head, int first_token, int count) {
  return {static_cast<const T*>(t.data) + head.b * t.batch + first_token * t.token + head.h * t.head, t.token, count};
}
template <typename T>
__device__ __forceinline__ Rows<T> query_rows(const TimestepAttentionArgs& a, const HeadTensor& t, const Head& head) {
  return rows_of<T>(t, head, a.query_offsets == nullptr ? 0 : head.first_query, head.queries);
}
template <typename T>
__device__ __forceinline__ Rows<T> key_rows(const TimestepAttentionArgs& a, const HeadTensor& t, const Head& head) {
  return rows_of<T>(t, head, a.key_offsets == nullptr ? 0 : head.first_key, head.keys);
}

// Copies rows first .. first + kRows - 1 of a head into a tile; zeros behind the last row and the last feature.
template <typename T, int D, int kRows>
__device__ __forceinline__ void load_rows(SharedAddress tile, const Rows<T>& rows, int first, int64_t dim) {
#pragma unroll 1   // more at once would keep more addresses in registers
  for (int i = threadIdx.x; i < kRows * Tile<D>::kUnits; i += kAttentionThreads) {
    const int r = i / Tile<D>::kUnits, unit = i % Tile<D>::kUnits;
    const bool valid = first + r < rows.count && unit * 8 < dim;
    copy_async(tile + Tile<D>::offset(r, unit), rows[valid ? first + r : 0] + (valid ? unit * 8 : 0), valid);
  }
}

// What a kernel is compiled for. The rotary form has few users: its kernels take dropout or none.
enum class Form { plain, dropout, rotary };
constexpr bool drops(Form form) { return form != Form::plain; }

// Whether scores have a product with tau.
template <Form kForm>
__device__ __forceinline__ bool adds_time(const TimestepAttentionArgs& a) {
  return kForm != Form::rotary && a.tau.data != nullptr;
}

__device__ __forceinline__ bool kept(const TimestepAttentionArgs& a, const Head& head, int key) {
  return key < head.keys && (a.key_mask == nullptr || __ldg(a.key_mask + head.first_key + key) != 0);
}

// Two stages of kBytes each: while use(stage, i) works on tile i, the copies of load(stage, i + 1) are under way. The copies
// that the block has issued before are complete, and visible, from the first use on; without a tile, behind a barrier of the
// caller's. meanwhile() runs while the first tile
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

// Tiles of k, tau (or the rotation) and v side by side.
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
  const Rows<T> k = key_rows<T>(a, a.k, head), v = key_rows<T>(a, a.v, head);
  const bool table = a.timesteps != nullptr;
  const Rows<T> time = table ? Rows<T>{static_cast<const T*>(a.tau.data) + head.h * a.tau.head, a.tau.token, 0}
                             : key_rows<T>(a, a.tau, head);
#pragma unroll 2   // more at once would keep more addresses in registers
  for (int i = threadIdx.x; i < kRows * Tile<D>::kUnits; i += kAttentionThreads) {
    const int r = i / Tile<D>::kUnits, unit = i % Tile<D>::kUnits, at = Tile<D>::offset(r, unit);
    // Not after a look at the mask: so the two loads are under way together.
    const int64_t timestep = table && first + r < head.keys ? __ldg(a.timesteps + head.first_key + first + r) : 0;
    const bool valid = kept(a, head, first + r) && unit * 8 < a.dim;
    const int key = valid ? first + r : 0, feature = valid ? unit * 8 : 0;
    copy_async(tiles.k + at, k[key] + feature, valid);
    copy_async(tiles.v + at, v[key] + feature, valid);
    if (a.tau.data == nullptr) continue;
    const bool there = valid && (!table || inside(timestep, a.table_rows));
    const int row = !there ? 0 : table ? static_cast<int>(timestep) : key;
    copy_async(tiles.tau + at, time[row] + feature, there);
  }
}

// --- The rotary form: the pairs (x1, x2) of neighbours in a row of q, k and v become (x1 c - x2 s, x2 c + x1 s), where the
// first half of the token's tau holds the cosines and the second the sines. ---

// The token's rotation; null where there is no such token or its timestep is outside the table.
template <typename T>
__device__ __forceinline__ const T* rotation_of(const TimestepAttentionArgs& a, const Head& head, int token) {
  if (token >= head.keys) return nullptr;
  if (a.timesteps == nullptr) return key_rows<T>(a, a.tau, head)[token];
  const int64_t row = __ldg(a.timesteps + head.first_key + token);
  return inside(row, a.table_rows) ? static_cast<const T*>(a.tau.data) + row * a.tau.token + head.h * a.tau.head : nullptr;
}

// Turns the rows of a tile, where they lie, by the rotations rotation(row); null leaves a row as it is.
template <typename T, int D, int kRows, typename Rotation>
__device__ __forceinline__ void rotate_tile(unsigned char* tile, int64_t dim, const Rotation& rotation) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * Tile<D>::kUnits; i += kAttentionThreads) {
    const int r = i / Tile<D>::kUnits, unit = i % Tile<D>::kUnits;
    const T* turn = rotation(r);
    if (turn == nullptr || unit * 8 >= dim) continue;
    uint4* at = reinterpret_cast<uint4*>(tile + Tile<D>::offset(r, unit));
    const uint4 x = *at;
    const uint2 cosines = *reinterpret_cast<const uint2*>(turn + 4 * unit);
    const uint2 sines = *reinterpret_cast<const uint2*>(turn + dim / 2 + 4 * unit);
    const float2 c[2] = {Mma<T>::unpack(cosines.x), Mma<T>::unpack(cosines.y)};
    const float2 s[2] = {Mma<T>::unpack(sines.x), Mma<T>::unpack(sines.y)};
    const auto turned = [](uint32_t word, float c, float s) {
      const float2 pair = Mma<T>::unpack(word);
      return Mma<T>::pack(pair.x * c - pair.y * s, pair.y * c + pair.x * s);
    };
    *at = uint4{turned(x.x, c[0].x, s[0].x), turned(x.y, c[0].y, s[0].y), turned(x.z, c[1].x, s[1].x),
                turned(x.w, c[1].y, s[1].y)};
  }
}

// Queries first .. first + kRows - 1 in a tile, by rotations that are read here.
template <typename T, int D, int kRows>
__device__ __forceinline__ void rotate_queries(unsigned char* tile, const TimestepAttentionArgs& a, const Head& head, int first) {
  rotate_tile<T, D, kRows>(tile, a.dim, [&](int r) { return rotation_of<T>(a, head, first + r); });
}

// k and v of tiles as load_keys fills them.
template <typename T, int D, int kRows>
__device__ __forceinline__ void rotate_keys(unsigned char* tiles, const TimestepAttentionArgs& a) {
  constexpr int kBytes = Tile<D>::bytes(kRows);
  const auto rotation = [&](int r) { return reinterpret_cast<const T*>(tiles + kBytes + Tile<D>::offset(r, 0)); };
  rotate_tile<T, D, kRows>(tiles, a.dim, rotation);
  rotate_tile<T, D, kRows>(tiles + 2 * kBytes, a.dim, rotation);
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
                                          const Head& head, int first, float* terms) {
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
    float term = keep ? sum * a.scale * kLog2E : __int_as_float(0xFF800000);
    if (keep && a.timesteps != nullptr && !inside(__ldg(a.timesteps + head.first_key + first + r), a.table_rows))
      term = __int_as_float(0x7FC00000);
    terms[r] = term;
  }
  return keep;
}

// What a block of queries, from `first` on and in the tile `queries`, does first with the j-th tile of keys: turns the rows,
// where they are to be turned, and makes the keys' terms. False: the mask removes all of these keys.
template <typename T, int D, Form kForm>
__device__ __forceinline__ bool begin_keys(unsigned char* stage, unsigned char* queries, const TimestepAttentionArgs& a,
                                           const Head& head, int first, int j, const float* biases, float* terms) {
  constexpr int kKeys = kWalk<D>;
  if (kForm == Form::rotary) {
    if (j == 0) rotate_queries<T, D, kAttentionRows>(queries, a, head, first);
    rotate_keys<T, D, kKeys>(stage, a);
  }
  return __syncthreads_or(key_terms<T, D, kKeys>(stage, biases, a, head, j * kKeys, terms)) != 0;
}

// c[n] += rows (an a-fragment; where `both`, the sum of two) x the transpose of `columns`, 8 columns per n.
template <typename T, int D, int kColumns>
__device__ __forceinline__ void multiply_transposed(float c[][4], const uint32_t a[4], const uint32_t second[4], bool both,
                                                    SharedAddress columns, int k, int lane) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; n += 2) {
    uint32_t b[4];
    Tile<D>::load_b(columns, 8 * n, k, lane, b);
    Mma<T>::multiply(c[n], a, b[0], b[1]);
    Mma<T>::multiply(c[n + 1], a, b[2], b[3]);
    if (!both) continue;
    Mma<T>::multiply(c[n], second, b[0], b[1]);
    Mma<T>::multiply(c[n + 1], second, b[2], b[3]);
  }
}
template <typename T, int D, int kColumns>
__device__ __forceinline__ void multiply_transposed(float c[][4], const uint32_t a[4], SharedAddress columns, int k, int lane) {
  multiply_transposed<T, D, kColumns>(c, a, a, false, columns, k, lane);
}

// c[16][D] += a (an a-fragment) x rows 16 k .. 16 k + 15 of the tile.
template <typename T, int D>
__device__ __forceinline__ void multiply_fragment(float c[][4], const uint32_t a[4], SharedAddress tile, int k, int lane) {
#pragma unroll
  for (int i = 0; i < D / 8; i += 2) {
    uint32_t b[4];
    Tile<D>::load_b_rows(tile, 16 * k, i, lane, b);
    Mma<T>::multiply(c[i], a, b[0], b[1]);
    Mma<T>::multiply(c[i + 1], a, b[2], b[3]);
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
    multiply_fragment<T, D>(c, words, tile, k, lane);
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

// A warp's 16 rows of accumulators, times factors[row half], into its own rows of a tile.
template <typename T, int D>
__device__ __forceinline__ void put_rows(unsigned char* tile, const float c[][4], const float factors[2]) {
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      uint32_t* at = reinterpret_cast<uint32_t*>(tile + Tile<D>::offset(own + lane / 4 + 8 * e, i)) + lane % 4;
      *at = Mma<T>::pack(c[i][2 * e] * factors[e], c[i][2 * e + 1] * factors[e]);
    }
}

// The warp's own rows of a tile to out + row * stride.
template <typename T, int D>
__device__ __forceinline__ void copy_out(const unsigned char* tile, T* out, int64_t stride, int first, int rows, int64_t dim) {
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
#pragma unroll
  for (int i = lane; i < 16 * Tile<D>::kUnits; i += 32) {
    const int r = own + i / Tile<D>::kUnits, unit = i % Tile<D>::kUnits;
    if (first + r < rows && unit * 8 < dim)
      *reinterpret_cast<uint4*>(out + (first + r) * stride + unit * 8) =
          *reinterpret_cast<const uint4*>(tile + Tile<D>::offset(r, unit));
  }
}

// Both; whatever else this warp did with its rows of the tile is over.
template <typename T, int D>
__device__ __forceinline__ void store_rows(unsigned char* tile, const float c[][4], const float factors[2], T* out,
                                           int64_t stride, int first, int rows, int64_t dim) {
  __syncwarp();
  put_rows<T, D>(tile, c, factors);
  __syncwarp();
  copy_out<T, D>(tile, out, stride, first, rows, dim);
}

// --- Dropout ---

struct DropoutKey {
  const TimestepAttentionArgs& args;
  const Head& at;
  uint32_t key0, key1;
  __device__ __forceinline__ DropoutKey(const TimestepAttentionArgs& a, const int64_t* device_seed, const Head& head)
      : args(a), at(head) {
    const uint64_t seed = device_seed == nullptr ? a.seed : static_cast<uint64_t>(__ldg(device_seed));
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
  }
  // 1 / (probability of survival), where it is needed: it is no register's worth in between.
  __device__ __forceinline__ float factor() const {
    return 1.f / (1.f - static_cast<float>(computed_anew(static_cast<int>(args.drop_threshold))) * kDropUnit);
  }
  __device__ __forceinline__ void draw(uint32_t group, uint32_t query, uint32_t words[4]) const {
    words[0] = group, words[1] = kAttentionStream, words[2] = query;
    words[3] = static_cast<uint32_t>(at.b * static_cast<int>(args.heads) + at.h);
    philox10(words, computed_anew(key0), computed_anew(key1));   // the keys of ten rounds are no registers' worth either
  }
  __device__ __forceinline__ bool survives(uint32_t piece) const { return piece >= args.drop_threshold; }
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
template <Form kForm, int kBlocks>
__device__ __forceinline__ uint32_t survivors_by_query(const DropoutKey& key, uint32_t query, uint32_t first_key, int lane) {
  if (!drops(kForm) || (kForm == Form::rotary && key.args.drop_threshold == 0)) return ~0u;
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
        bits |= (key.survives(words[i] & 0xFFFFu) ? 1u : 0u) << at;
        bits |= (key.survives(words[i] >> 16) ? 1u : 0u) << (at + 1);
      }
    }
  return bits;
}

// The same for [16 keys][8 kBlocks queries]: lane l draws the block of query l % 8 of the accumulator 4 g + l / 8.
template <Form kForm, int kBlocks>
__device__ __forceinline__ uint32_t survivors_by_key(const DropoutKey& key, uint32_t first_query, uint32_t first_key, int lane) {
  if (!drops(kForm) || (kForm == Form::rotary && key.args.drop_threshold == 0)) return ~0u;
  uint32_t bits = 0;
#pragma unroll 1   // in turn: all at once would take too many registers
  for (int half = 0; half < 2; ++half)
#pragma unroll 1
    for (int g = 0; g < kBlocks / 4; ++g) {
      uint32_t words[4];
      key.draw(first_key / 8 + half, first_query + 8 * (4 * g + lane / 8) + (lane & 7), words);
#pragma unroll 1
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
          bits |= (key.survives(piece) ? 1u : 0u) << (4 * (4 * g + i) + 2 * half + e);
        }
    }
  return bits;
}

// --- Launches ---

template <Form kForm>
struct FormTag {
  static constexpr Form value = kForm;
};

template <int kDim>
struct HeadDim {
  static constexpr int value = kDim;
};

// Calls run(zero of the element type, HeadDim of at least dim, FormTag) and returns its status.
template <typename Run>
cudaError_t for_kernel(const TimestepAttentionArgs& args, FloatType dtype, Run&& run) {
  const int64_t dim = args.dim;
  const auto for_form = [&](auto zero, auto head_dim) {
    if (args.rotary) return run(zero, head_dim, FormTag<Form::rotary>{});
    if (args.drop_threshold != 0) return run(zero, head_dim, FormTag<Form::dropout>{});
    return run(zero, head_dim, FormTag<Form::plain>{});
  };
  const auto for_dim = [&](auto zero) {
    if (dim <= 16) return for_form(zero, HeadDim<16>{});
    if (dim <= 32) return for_form(zero, HeadDim<32>{});
    if (dim <= 64) return for_form(zero, HeadDim<64>{});
    if (dim <= 96) return for_form(zero, HeadDim<96>{});
    return for_form(zero, HeadDim<128>{});
  };
  if (dim % 8 != 0 || dim > 128) return cudaErrorInvalidValue;
  if (args.batch * std::max(args.queries, args.keys) > 0x7FFFFFFF) return cudaErrorInvalidValue;
  if (dtype == FloatType::bfloat16) return for_dim(__nv_bfloat16{});
  if (dtype == FloatType::float16) return for_dim(__half{});
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace pds
