// Exact nearest rows on CUDA, by the argument of csrc/cpu/nearest.cpp: bfloat16 products give every score s = x . e + b to
// within a proven bound eps; only rows with s + eps >= the best s - eps can win, and float64 decides among them.
//
// prepare: x, less the centre, in bfloat16, and the row's share of eps.
// filter:  tiles of 128 rows x 128 columns on the tensor cores; scores stay in registers. A thread has 16 columns of a tile in
//          each of its rows; of all tiles it keeps the two highest groups of 16 and the bound of the third (NearestSlot).
// rerank:  a warp per row looks at the groups that remain possible, in float64. Where a thread's third group is possible, too,
//          the whole table is searched (rare; the block's 8 warps share that). For the k best instead of the best, what is
//          possible is what reaches the k-th highest lower bound; more parts of the table keep the third groups out of it.
#include "cuda/nearest.h"

#include <algorithm>
#include <cmath>

#include "cuda/row_tiles.cuh"

namespace pds {
namespace cuda {
namespace {

constexpr int kRerankRows = 8;
constexpr int kMarginBytes = 2 * kTileRows * 4, kLowerBytes = 4 * kTileThreads * 4;

// Bound of |s computed - s| / (|x| |e|): each factor's rounding to bfloat16 costs 2^-9; every sum up to 2^-21, four times
// what sums in float32 would, since tensor cores truncate. In units of float64, with pydiffseq/ops/nearest.py.
__device__ __forceinline__ double sum_error(int64_t dim) { return static_cast<double>(dim + 8) / (1 << 21); }
__device__ __forceinline__ double relative_error(int64_t dim) { return 1.0 / 256 + 1.0 / 65536 + sum_error(dim); }
// Numbers below 2^-126 may count as 0.
__device__ __forceinline__ double flush_error(int64_t dim) { return static_cast<double>(dim) * 2.4e-38; }
__device__ __forceinline__ float rounded_up(double x) { return static_cast<float>(x * (1.0 + 1.0 / (1 << 20))); }

// --- Rows ---

// margins[row] = (share, own): eps = share * norm of the tile + slack of the tile + own. share = inf: search everything;
// own = NaN as well: x has NaN, nothing can win.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) nearest_prepare_kernel(const __grid_constant__ NearestCudaArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kTileThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= a.rows) return;
  const T* x = static_cast<const T*>(a.x) + row * a.dim;
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(a.rows16) + row * a.padded;
  double square = 0.0;
  for (int64_t k = lane; k < a.dim; k += 32) {
    const double value = widen(x[k]);
    square += value * value;
  }
  square = sum_over_warp(square);
  const bool tame = square < kNearestHuge * kNearestHuge;
  const bool undefined = square != square;
  square = 0.0;
  for (int64_t k = lane; k < a.padded; k += 32) {
    const float value = tame && k < a.dim ? widen(x[k]) - __ldg(a.centre + k) : 0.f;
    square += static_cast<double>(value) * value;
    narrow(value, out[k]);
  }
  const double norm = sqrt(sum_over_warp(square));
  if (lane != 0) return;
  a.margins[2 * row] = tame ? rounded_up(norm * relative_error(a.dim) + flush_error(a.dim)) : INFINITY;
  a.margins[2 * row + 1] = undefined ? NAN : rounded_up(flush_error(a.dim) * (1.0 + norm));
}

// --- Filter ---

__device__ __forceinline__ void offer(NearestSlot& slot, float upper, uint32_t group) {
  if (upper > slot.first) {
    slot.third = slot.second;
    slot.second = slot.first;
    slot.first = upper;
    slot.groups = slot.groups << 16 | group;
  } else if (upper > slot.second) {
    slot.third = slot.second;
    slot.second = upper;
    slot.groups = (slot.groups & 0xFFFFu) | group << 16;
  } else {
    slot.third = fmaxf(slot.third, upper);
  }
}

template <bool kResident, int kStages>
__global__ void __launch_bounds__(kTileThreads, kResident ? 2 : 1) nearest_filter_kernel(const __grid_constant__ NearestCudaArgs a) {
  PDS_SHARED_MEMORY(shared);
  float* margins = reinterpret_cast<float*>(shared);
  float* lower = reinterpret_cast<float*>(shared + kMarginBytes) + threadIdx.x;   // of its rows; registers are scarce
  const TilePlace<64> at;
  const BlockShare share(a.rows, a.tiles, a.parts);
  const int stride = static_cast<int>(a.padded);
  const RowMatrix<__nv_bfloat16> x{static_cast<const __nv_bfloat16*>(a.rows16), a.rows, stride};
  const RowMatrix<__nv_bfloat16, true> table{static_cast<const __nv_bfloat16*>(a.packed), 0, stride};
  NearestSlot slots[4];   // of the thread's rows
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    slots[i] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, 0xFFFFFFFFu};
    lower[i * kTileThreads] = -INFINITY;
  }
  for (int i = threadIdx.x; i < 2 * kTileRows; i += kTileThreads)   // seen after the walk's first barrier
    margins[i] = i < 2 * share.rows ? a.margins[2 * share.first_row + i] : 0.f;
  walk_tiles<__nv_bfloat16, kResident, kStages>(
      shared_address(shared + kMarginBytes + kLowerBytes), x, table, a.packed_bias, share, at,
      [&](int tile, const float scores[2][8][4]) {
        const float norm = __ldg(a.norm + tile), slack = __ldg(a.slack + tile);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float best = -INFINITY;
#pragma unroll
          for (int n = 0; n < 8; ++n)
            best = fmaxf(best, fmaxf(scores[i / 2][n][2 * (i % 2)], scores[i / 2][n][2 * (i % 2) + 1]));
          const float2 margin = reinterpret_cast<const float2*>(margins)[at.row(i)];
          const float eps = margin.x * norm + slack + margin.y;
          lower[i * kTileThreads] = fmaxf(lower[i * kTileThreads], best - eps);
          offer(slots[i], best + eps, 2 * tile + at.first_column / 64);
        }
      });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = at.first_column / 16 + (at.lane & 3);
    slots[i].lower = lower[i * kTileThreads];
    if (at.row(i) < share.rows)
      a.slots[((share.first_row + at.row(i)) * a.parts + share.part) * kNearestSlots + slot] = slots[i];
  }
}

// --- Decision ---

// The best of the candidates that a warp is shown, the same in all lanes; ties to the lowest id, NaN never wins.
struct Best {
  double score = -HUGE_VAL;
  int64_t id = 0;
  __device__ __forceinline__ void consider(double candidate, int64_t v) {
    if (candidate > score || (candidate == score && v < id)) score = candidate, id = v;
  }
};

// The 32 best, lane j has the j-th; NaN counts as -inf.
struct Ranking {
  static constexpr int64_t kNone = INT64_MAX;
  double score = -HUGE_VAL;
  int64_t id = kNone;
  __device__ __forceinline__ void consider(double candidate, int64_t v) {
    const int lane = threadIdx.x % 32, above = (lane + 31) % 32;
    if (candidate != candidate) candidate = -HUGE_VAL;
    const int before = candidate > score || (candidate == score && v < id);
    const double above_score = __shfl_sync(kWholeWarp, score, above);
    const int64_t above_id = __shfl_sync(kWholeWarp, id, above);
    const bool moves_down = __shfl_sync(kWholeWarp, before, above) != 0 && lane > 0;
    if (before == 0) return;
    score = moves_down ? above_score : candidate;
    id = moves_down ? above_id : v;
  }
};

// The score by the definition: minus the squared distance, or the product; the same in all lanes.
template <typename T>
__device__ __forceinline__ double exact_score(const NearestCudaArgs& a, const T* x, int64_t v, int lane) {
  const T* e = static_cast<const T*>(a.table) + v * a.dim;
  double sum = 0.0;
  for (int64_t k = lane; k < a.dim; k += 32) {
    const double u = widen(x[k]), w = widen(e[k]);
    sum += a.dot ? u * w : -(u - w) * (u - w);
  }
  sum = sum_over_warp(sum);
  return a.dot && a.bias != nullptr ? sum + static_cast<double>(widen(static_cast<const T*>(a.bias)[v])) : sum;
}

constexpr uint32_t kNoGroup = 0xFFFF;

// The 16 columns of a group: those of lane % 4 = slot % 4 in half a tile. Wild rows, whose bias is -inf, are considered once, elsewhere.
template <typename T, typename Keep>
__device__ __forceinline__ void consider_group(const NearestCudaArgs& a, const T* x, uint32_t group, int slot, int lane,
                                               Keep& keep) {
  const int64_t first = static_cast<int64_t>(group) * 64 + 2 * (slot & 3);
  for (int i = 0; i < 16; ++i) {
    const int64_t v = first + 8 * (i / 2) + i % 2;
    if (v < a.vocab && __ldg(a.packed_bias + v) > -INFINITY) keep.consider(exact_score(a, x, v, lane), v);
  }
}

// The k-th highest of the slots' lower bounds, each of a column of its own: k scores are at least this.
__device__ __forceinline__ float kth_lower(const NearestSlot* slots, int count, int64_t k, int lane) {
  float bound = INFINITY;   // the one taken last; after it come lower ones, and equal ones of later slots
  int at = -1;
  for (int64_t round = 0; round < k; ++round) {
    float best = -INFINITY;
    int where = count;
    for (int s = lane; s < count; s += 32) {
      const float value = slots[s].lower;
      if (value > best && (value < bound || (value == bound && s > at))) best = value, where = s;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = __shfl_xor_sync(kWholeWarp, best, mask);
      const int place = __shfl_xor_sync(kWholeWarp, where, mask);
      if (other > best || (other == best && place < where)) best = other, where = place;
    }
    bound = best, at = where;
  }
  return bound;
}

// What the slots and the wild rows allow; false: the whole table has to be searched.
template <typename T, typename Keep>
__device__ __forceinline__ bool decide(const NearestCudaArgs& a, const T* x, int64_t row, int lane, Keep& keep) {
  const int count = static_cast<int>(a.parts) * kNearestSlots;
  const NearestSlot* slots = a.slots + row * count;
  const float lower = kth_lower(slots, count, a.k, lane);
  for (int s = 0; s < count; ++s)
    if (slots[s].third >= lower && slots[s].third > -INFINITY) return false;
  for (int s = 0; s < count; ++s) {
    const NearestSlot slot = slots[s];
    const uint32_t first_group = slot.groups & 0xFFFFu, second_group = slot.groups >> 16;
    if (first_group != kNoGroup && slot.first >= lower) consider_group(a, x, first_group, s, lane, keep);
    if (second_group != kNoGroup && slot.second >= lower) consider_group(a, x, second_group, s, lane, keep);
  }
  for (int i = 1; i <= __ldg(a.wild); ++i) keep.consider(exact_score(a, x, __ldg(a.wild + i), lane), a.wild[i]);
  return true;
}

struct Scored {
  double score;
  int64_t id;
};

// The best a.k words of the warp's row, of which a block has kRerankRows. `all` has room for those of its warps, `open` for
// a word per warp.
template <typename T, typename Keep>
__device__ __forceinline__ Keep search_row(const NearestCudaArgs& a, int64_t row, Scored* all, int* open) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = static_cast<int>(a.k);
  const T* x = static_cast<const T*>(a.x);
  Keep keep;
  bool decided = true;
  if (row < a.rows && a.margins[2 * row + 1] == a.margins[2 * row + 1])   // a row with NaN stays as it is
    decided = a.margins[2 * row] < INFINITY && decide(a, x + row * a.dim, row, lane, keep);
  if (lane == 0) open[warp] = !decided;
  __syncthreads();
  for (int r = 0; r < kRerankRows; ++r) {
    if (open[r] == 0) continue;
    Keep part;
    for (int64_t v = warp; v < a.vocab; v += kRerankRows)
      part.consider(exact_score(a, x + (row - warp + r) * a.dim, v, lane), v);
    if (lane < k) all[warp * k + lane] = {part.score, part.id};
    __syncthreads();
    if (warp == r) {
      keep = Keep();
      for (int i = 0; i < kRerankRows * k; ++i) keep.consider(all[i].score, all[i].id);
    }
    __syncthreads();
  }
  return keep;
}

template <typename T>
__global__ void __launch_bounds__(kRerankRows * 32, 3) nearest_rerank_kernel(const __grid_constant__ NearestCudaArgs a) {
  PDS_SHARED_MEMORY(shared);
  Scored* all = reinterpret_cast<Scored*>(shared);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRerankRows + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Best best = search_row<T, Best>(a, row, all, reinterpret_cast<int*>(all + kRerankRows));
  if (row >= a.rows) return;
  if (lane == 0) a.ids[row] = best.id;
  const T* from = static_cast<const T*>(a.table) + best.id * a.dim;
  T* to = static_cast<T*>(a.embeddings) + row * a.dim;
  for (int64_t k = lane; k < a.dim; k += 32) to[k] = from[k];
}

template <typename T>
__global__ void __launch_bounds__(kRerankRows * 32, 3) nearest_topk_kernel(const __grid_constant__ NearestCudaArgs a) {
  PDS_SHARED_MEMORY(shared);
  Scored* all = reinterpret_cast<Scored*>(shared);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRerankRows + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Ranking ranking = search_row<T, Ranking>(a, row, all, reinterpret_cast<int*>(all + kRerankRows * a.k));
  if (row >= a.rows || lane >= a.k) return;
  a.ids[row * a.k + lane] = ranking.id == Ranking::kNone ? lane : ranking.id;   // none: x has NaN, all scores count as -inf
  a.scores[row * a.k + lane] = static_cast<float>(ranking.score);
}

// --- Launches ---

template <typename T>
cudaError_t run(const NearestCudaArgs& args, const Launch& launch, int most_shared) {
  const int64_t warps = kTileThreads / 32, row_tiles = (args.rows + kTileRows - 1) / kTileRows;
  cudaError_t status = start(&nearest_prepare_kernel<T>, Grid{(args.rows + warps - 1) / warps, kTileThreads, 0}, launch, args);
  if (status != cudaSuccess) return status;
  const int64_t chunks = args.padded / kTileFeatures, kept = kMarginBytes + kLowerBytes;
  const int64_t resident = kept + walk_bytes(true, 3, chunks);
  const bool fits = resident <= most_shared;
  const int64_t shared_bytes = fits ? resident : kept + walk_bytes(false, 2, chunks);
  const Grid grid{row_tiles * args.parts, kTileThreads, static_cast<size_t>(shared_bytes)};
  status = fits ? start(&nearest_filter_kernel<true, 3>, grid, launch, args)
                : start(&nearest_filter_kernel<false, 2>, grid, launch, args);
  if (status != cudaSuccess) return status;
  const size_t shared = kRerankRows * (args.k * sizeof(Scored) + sizeof(int));
  const Grid rows{(args.rows + kRerankRows - 1) / kRerankRows, kRerankRows * 32, shared};
  return args.scores != nullptr ? start(&nearest_topk_kernel<T>, rows, launch, args)
                                : start(&nearest_rerank_kernel<T>, rows, launch, args);
}

}  // namespace

int64_t tile_parts(int64_t rows, int64_t tiles, int device) {
  int processors = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return -static_cast<int64_t>(status);
  const int64_t row_tiles = std::max<int64_t>(1, (rows + kTileRows - 1) / kTileRows);
  const int64_t wanted = std::min(tiles, std::max<int64_t>(1, (2 * processors + row_tiles - 1) / row_tiles));
  const int64_t tiles_per_part = (tiles + wanted - 1) / wanted;
  return (tiles + tiles_per_part - 1) / tiles_per_part;
}

Status nearest_search(const NearestCudaArgs& args, const Launch& launch) {
  if (args.rows == 0) return cudaSuccess;
  int processors = 0, most_shared = 0;
  cudaError_t status = enter_device(launch.device, processors);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, launch.device);
  if (status != cudaSuccess) return status;
  switch (launch.dtype) {
    case FloatType::float32: return run<float>(args, launch, most_shared);
    case FloatType::bfloat16: return run<__nv_bfloat16>(args, launch, most_shared);
    case FloatType::float16: return run<__half>(args, launch, most_shared);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace cuda
}  // namespace pds
