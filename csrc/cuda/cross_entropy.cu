// Cross-entropy of a linear layer on CUDA: logits are made tile by tile (row_tiles.cuh) and never leave the chip.
//
// forward:  every thread keeps a running log-sum-exp of its columns of its rows; the blocks' sums are merged in a fixed order.
// backward: a block owns 128 rows of x and walks over the table, or owns 128 rows of the table and walks over x; it makes
//           the logits again, turns them into their gradients, rounds these to 16 bits and multiplies them by the rows it
//           walks over, with sums in float32 registers. No atomics: where several blocks share a row, their sums are added
//           in a fixed order.
//
// The gradients of the logits are kept in units of the largest |grad|, so that those of a mean survive float16.
#include "cuda/cross_entropy.h"

#include "cuda/row_tiles.cuh"

namespace pds {
namespace cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLowest = -1e30f;   // a row without a logit above this has no softmax
constexpr int kStages = 3;
constexpr int kTargetBytes = kTileRows * 4;

// e^x for x <= 0, of a difference made first: large logits keep their accuracy.
__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * kLog2E); }

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7FC00000); }

// The column of a row's target; -1: the row is left out, -2: there is no such column.
__device__ __forceinline__ int target_of(const CrossEntropyCudaArgs& a, int64_t row) {
  const int64_t target = __ldg(a.target + row);
  return target == a.ignore_index ? -1 : inside(target, a.vocab) ? static_cast<int>(target) : -2;
}

template <typename T>
__device__ __forceinline__ RowMatrix<T> x_of(const CrossEntropyCudaArgs& a) {
  return {static_cast<const T*>(a.x), a.rows, static_cast<int>(a.stride)};
}
template <typename T>
__device__ __forceinline__ RowMatrix<T> table_of(const CrossEntropyCudaArgs& a) {
  return {static_cast<const T*>(a.table), a.vocab, static_cast<int>(a.stride)};
}

// --- Forward ---

__device__ __forceinline__ LogSum merge(const LogSum& a, const LogSum& b) {
  const float highest = fmaxf(a.highest, b.highest);
  return {highest, a.sum * fast_exp(a.highest - highest) + b.sum * fast_exp(b.highest - highest), a.total + b.total};
}

// Adds the 16 logits of the thread's row i of a tile. NaN passes the maximum and shows in the sum.
__device__ __forceinline__ void add_logits(LogSum& to, const float scores[2][8][4], int i) {
  float highest = to.highest;
#pragma unroll
  for (int n = 0; n < 8; ++n)
    highest = fmaxf(highest, fmaxf(scores[i / 2][n][2 * (i % 2)], scores[i / 2][n][2 * (i % 2) + 1]));
  float sum = to.sum * fast_exp(to.highest - highest);
#pragma unroll
  for (int n = 0; n < 8; ++n)
    sum += fast_exp(scores[i / 2][n][2 * (i % 2)] - highest) + fast_exp(scores[i / 2][n][2 * (i % 2) + 1] - highest);
  to.highest = highest;
  to.sum = sum;
}

// Stores the logit of the row's target where it is among the thread's columns; static indices keep the scores in registers.
__device__ __forceinline__ void note_target(float* out, const float scores[2][8][4], int i, int offset, const TilePlace<64>& at) {
  float logit = 0.f;
  bool here = false;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const bool match = at.column(n) + c == offset;
      logit = match ? scores[i / 2][n][2 * (i % 2) + c] : logit;
      here |= match;
    }
  }
  if (here) *out = logit;
}

// The sum of the row's logits in the first `columns` columns of the tile; what lies behind the vocabulary is -inf.
__device__ __forceinline__ float sum_of_logits(const float scores[2][8][4], int i, int columns, const TilePlace<64>& at) {
  float sum = 0.f;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if (at.column(n) < columns) sum += scores[i / 2][n][2 * (i % 2)];
    if (at.column(n) + 1 < columns) sum += scores[i / 2][n][2 * (i % 2) + 1];
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2) cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyCudaArgs a) {
  PDS_SHARED_MEMORY(shared);
  int* targets = reinterpret_cast<int*>(shared);
  const TilePlace<64> at;
  const BlockShare share(a.rows, (a.vocab + kTileRows - 1) / kTileRows, a.parts);
  for (int i = threadIdx.x; i < kTileRows; i += kTileThreads)   // seen after the walk's first barrier
    targets[i] = i < share.rows ? target_of(a, share.first_row + i) : -1;
  LogSum sums[4];   // of the thread's rows
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = {kLowest, 0.f, 0.f};
  walk_tiles<T, true, kStages>(
      shared_address(shared + kTargetBytes), x_of<T>(a), table_of<T>(a), a.bias, share, at, [&](int tile, const float scores[2][8][4]) {
        const int first = tile * kTileRows;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int offset = targets[at.row(i)] - first;
          float* at_target = a.at_target + share.first_row + at.row(i);
          if (inside(offset, kTileRows)) note_target(at_target, scores, i, offset, at);
          add_logits(sums[i], scores, i);
        }
        if (a.uniform == 0.f) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i].total += sum_of_logits(scores, i, static_cast<int>(a.vocab) - first, at);
      });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {   // the lanes of a row
      const LogSum other{__shfl_xor_sync(kWholeWarp, sums[i].highest, mask), __shfl_xor_sync(kWholeWarp, sums[i].sum, mask),
                         __shfl_xor_sync(kWholeWarp, sums[i].total, mask)};
      sums[i] = merge(sums[i], other);
    }
    if ((at.lane & 3) == 0 && at.row(i) < share.rows)
      a.sums[((share.first_row + at.row(i)) * a.parts + share.part) * 2 + at.first_column / 64] = sums[i];
  }
}

__global__ void __launch_bounds__(kTileThreads) cross_entropy_finish_kernel(const __grid_constant__ CrossEntropyCudaArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (row >= a.rows) return;
  const int target = target_of(a, row);
  float loss = 0.f, lse = 0.f;
  if (target == -2) loss = lse = not_a_number();
  if (target >= 0) {
    LogSum sum = a.sums[row * a.parts * 2];
    for (int64_t i = 1; i < a.parts * 2; ++i) sum = merge(sum, a.sums[row * a.parts * 2 + i]);
    lse = sum.highest > kLowest ? sum.highest + logf(sum.sum) : not_a_number();
    loss = lse - a.keep * a.at_target[row];
    if (a.uniform > 0.f) loss -= a.uniform * sum.total;
  }
  a.losses[row] = loss;
  a.lse[row] = lse;
}

// --- Backward ---

// samples, and the largest |grad| of the rows that count (1 if all are 0); one block, as large as there are.
constexpr int kSampleThreads = 1024;
__global__ void __launch_bounds__(kSampleThreads)
cross_entropy_samples_kernel(const __grid_constant__ CrossEntropyCudaArgs a) {
  PDS_SHARED_MEMORY(shared);
  float* of_warps = reinterpret_cast<float*>(shared);
  float largest = 0.f;
  for (int64_t row = threadIdx.x; row < a.rows; row += kSampleThreads) {
    const float size = fabsf(__ldg(a.grad + row));
    if (target_of(a, row) >= 0 && size < INFINITY) largest = fmaxf(largest, size);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, mask));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < kSampleThreads / 32; ++i) largest = fmaxf(largest, of_warps[i]);
  if (largest == 0.f) largest = 1.f;
  if (threadIdx.x == 0) *a.largest = largest;
  const int64_t padded = (a.rows + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t row = threadIdx.x; row < padded; row += kSampleThreads) {
    const int target = row < a.rows ? target_of(a, row) : -1;
    SampleRow sample{1e30f, 0.f, -1};   // softmax 0
    if (target >= 0) sample = {a.lse[row], a.grad[row] / largest, target};
    if (target == -2) sample.lse = sample.scale = not_a_number();
    a.samples[row] = sample;
  }
}

// Shared memory: the owned rows, two stages of the rows walked over, the logits' gradients [128][64], and for grad_bias the
// sums of every thread's gradients by row (registers are scarce).
template <int kChunks>
struct GradientLayout {
  static constexpr int kLeft = kChunks * kChunkBytes, kStage = kChunks * Chunk::bytes(kGradientTile);
  static constexpr int kGradients = kLeft + 2 * kStage, kSums = kGradients + kChunkBytes;
  static constexpr int kBytes = kSums + 4 * kTileThreads * 4;
};

// d loss / d logit in units of the largest |grad|.
__device__ __forceinline__ float gradient(float logit, const SampleRow& sample, int column, float uniform, float keep) {
  const float softmax = fast_exp(logit - sample.lse);
  return sample.scale * (softmax - uniform - (column == sample.target ? keep : 0.f));
}

// Turns a tile's logits into their gradients, 16-bit, in shared memory; `sums`, one per row of the thread, are those of a tile.
// kOwnsX: rows are samples and columns words, from `first` on; else the other way round, rows from `first_row` on.
template <typename T, bool kOwnsX>
__device__ __forceinline__ void write_gradients(const CrossEntropyCudaArgs& a, const float scores[2][4][4], int64_t first_row,
                                                int64_t first, const TilePlace<32>& at, unsigned char* out, float sums[4]) {
  const auto write = [&](int i, int n, const SampleRow& first_sample, const SampleRow& second_sample) {
    const int word = static_cast<int>(kOwnsX ? first + at.column(n) : first_row + at.row(i));
    const float* logits = &scores[i / 2][n][2 * (i % 2)];
    const float g0 = gradient(logits[0], first_sample, word, a.uniform, a.keep);
    const float g1 = gradient(logits[1], second_sample, kOwnsX ? word + 1 : word, a.uniform, a.keep);
    sums[i] += g0 + g1;
    unsigned char* place = out + Chunk::offset(at.row(i), at.column(n) / 8) + at.column(n) % 8 * 2;
    *reinterpret_cast<uint32_t*>(place) = Mma<T>::pack(g0, g1);
  };
#pragma unroll
  for (int outer = 0; outer < 4; ++outer) {   // few samples at a time: registers are scarce
    const SampleRow* samples = a.samples + (kOwnsX ? first_row + at.row(outer) : first + at.column(outer));
    const SampleRow one = samples[0], two = kOwnsX ? one : samples[1];
#pragma unroll
    for (int inner = 0; inner < 4; ++inner) write(kOwnsX ? outer : inner, kOwnsX ? inner : outer, one, two);
  }
}

// product += gradients . rows walked over. A warp has its 32 rows and 32 kChunks features from 32 kChunks (w / 4) on.
template <typename T, int kChunks>
__device__ __forceinline__ void add_product(float product[2][4 * kChunks][4], SharedAddress gradients, SharedAddress right,
                                            const TilePlace<32>& at) {
#pragma unroll 1
  for (int k = 0; k < kGradientTile / 16; ++k) {
    uint32_t rows[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) Chunk::load_a(gradients, at.first_row + 16 * i, k, at.lane, rows[i]);
#pragma unroll
    for (int n = 0; n < 4 * kChunks; n += 2) {
      const int feature = at.first_column * kChunks + 8 * n;
      const SharedAddress chunk = right + feature / kTileFeatures * Chunk::bytes(kGradientTile);
      uint32_t columns[4];
      Chunk::load_b_rows(chunk, 16 * k, feature % kTileFeatures / 8, at.lane, columns);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Mma<T>::multiply(product[i][n], rows[i], columns[0], columns[1]);
        Mma<T>::multiply(product[i][n + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

// The block's rows of grad_x or grad_table: done, where it alone has them; else a part, still in units of the largest |grad|.
template <typename T, bool kOwnsX, int kChunks>
__device__ __forceinline__ void store_product(const CrossEntropyCudaArgs& a, const float product[2][4 * kChunks][4],
                                              const BlockShare& share, const TilePlace<32>& at) {
  const int64_t all_rows = kOwnsX ? a.rows : a.vocab, parts = kOwnsX ? a.parts_x : a.parts_table;
  T* out = static_cast<T*>(kOwnsX ? a.grad_x : a.grad_table);
  const float unit = *a.largest;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at.row(i) >= share.rows) continue;
    const int64_t row = share.first_row + at.row(i);
#pragma unroll
    for (int n = 0; n < 4 * kChunks; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int feature = at.first_column * kChunks + 8 * n + 2 * (at.lane & 3) + c;
        const float value = product[i / 2][n][2 * (i % 2) + c];
        if (feature >= a.dim) continue;
        if (parts == 1) narrow(value * unit, out[row * a.dim + feature]);
        else a.partial[(share.part * all_rows + row) * a.dim + feature] = value;
      }
    }
  }
}

// The sums of the gradients of the block's words, over the samples of its part. `all`: of row i of thread t at [i][t].
__device__ __forceinline__ void store_bias(const CrossEntropyCudaArgs& a, const float* all, const BlockShare& share) {
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= share.rows) return;
  const int thread = row / 32 * 32 + row % 8 * 4;   // the first of four, and of four 128 threads on, that have the row
  float sum = 0.f;
  for (int i = 0; i < 8; ++i) sum += all[row % 32 / 8 * kTileThreads + i / 4 * 128 + thread + i % 4];
  a.partial_bias[share.part * a.vocab + share.first_row + row] = sum;
}

template <typename T, bool kOwnsX, int kChunks>
__global__ void __launch_bounds__(kTileThreads, 2)
cross_entropy_gradient_kernel(const __grid_constant__ CrossEntropyCudaArgs a) {
  using Layout = GradientLayout<kChunks>;
  PDS_SHARED_MEMORY(shared);
  const TilePlace<32> at;
  const RowMatrix<T> left = kOwnsX ? x_of<T>(a) : table_of<T>(a), right = kOwnsX ? table_of<T>(a) : x_of<T>(a);
  const BlockShare share(left.rows, (right.rows + kGradientTile - 1) / kGradientTile, kOwnsX ? a.parts_x : a.parts_table);
  const SharedAddress memory = shared_address(shared);
  const auto load = [&](int tile) {
    const SharedAddress stage = memory + Layout::kLeft + (tile - share.tile) % 2 * Layout::kStage;
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk)
      load_chunk<kGradientTile>(stage + chunk * Chunk::bytes(kGradientTile), right, int64_t{tile} * kGradientTile, chunk);
  };
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk)
    load_chunk<kTileRows>(memory + chunk * kChunkBytes, left, share.first_row, chunk);
  load(share.tile);
  commit_copies();
  float product[2][4 * kChunks][4] = {};
  float* all_sums = reinterpret_cast<float*>(shared + Layout::kSums);
  for (int i = 0; i < 4; ++i) all_sums[i * kTileThreads + threadIdx.x] = 0.f;
#pragma unroll 1
  for (int tile = share.tile; tile < share.end_tile; ++tile) {
    const SharedAddress stage = memory + Layout::kLeft + (tile - share.tile) % 2 * Layout::kStage;
    const int64_t first = static_cast<int64_t>(tile) * kGradientTile;
    wait_copies<0>();
    __syncthreads();   // the tile is there for all, and what the last one used is free
    if (tile + 1 < share.end_tile) load(tile + 1);
    commit_copies();
    float scores[2][4][4];
    if (kOwnsX) start_scores<32>(scores, a.bias + first, at);
    else start_scores_by_row(scores, a.bias + share.first_row, at);
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk)
      multiply_chunk<T, 32>(scores, memory + chunk * kChunkBytes, stage + chunk * Chunk::bytes(kGradientTile), at);
    float sums[4] = {};
    write_gradients<T, kOwnsX>(a, scores, share.first_row, first, at, shared + Layout::kGradients, sums);
    if (!kOwnsX) {
#pragma unroll
      for (int i = 0; i < 4; ++i) all_sums[i * kTileThreads + threadIdx.x] += sums[i];
    }
    __syncthreads();
    add_product<T, kChunks>(product, memory + Layout::kGradients, stage, at);
  }
  store_product<T, kOwnsX, kChunks>(a, product, share, at);
  if (!kOwnsX && a.partial_bias != nullptr) store_bias(a, all_sums, share);
}

// out = the sum of the parts, in their order, in the units of the gradients.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
cross_entropy_sum_kernel(const float* partial, const float* largest, T* out, int64_t size, int64_t parts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int64_t part = 0; part < parts; ++part) sum += partial[part * size + i];
  narrow(sum * *largest, out[i]);
}

// --- Launches ---

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <typename T>
cudaError_t run_forward(const CrossEntropyCudaArgs& a, const Launch& launch) {
  const size_t shared = kTargetBytes + walk_bytes(true, kStages, blocks_of(a.stride, kTileFeatures));
  const Grid grid{blocks_of(a.rows, kTileRows) * a.parts, kTileThreads, shared};
  const cudaError_t status = start(&cross_entropy_forward_kernel<T>, grid, launch, a);
  if (status != cudaSuccess) return status;
  return start(&cross_entropy_finish_kernel, Grid{blocks_of(a.rows, kTileThreads), kTileThreads, 0}, launch, a);
}

template <typename T>
cudaError_t run_sum(const float* partial, const float* largest, void* out, int64_t size, int64_t parts, const Launch& launch) {
  return start(&cross_entropy_sum_kernel<T>, Grid{blocks_of(size, kTileThreads), kTileThreads, 0}, launch, partial, largest,
               static_cast<T*>(out), size, parts);
}

template <typename T, bool kOwnsX, int kChunks>
cudaError_t run_gradient(const CrossEntropyCudaArgs& a, const Launch& launch) {
  const int64_t rows = kOwnsX ? a.rows : a.vocab, parts = kOwnsX ? a.parts_x : a.parts_table;
  const Grid grid{blocks_of(rows, kTileRows) * parts, kTileThreads, GradientLayout<kChunks>::kBytes};
  const cudaError_t status = start(&cross_entropy_gradient_kernel<T, kOwnsX, kChunks>, grid, launch, a);
  if (status != cudaSuccess || parts == 1) return status;
  return run_sum<T>(a.partial, a.largest, kOwnsX ? a.grad_x : a.grad_table, rows * a.dim, parts, launch);
}

template <typename T, int kChunks>
cudaError_t run_backward(const CrossEntropyCudaArgs& a, const Launch& launch) {
  cudaError_t status = start(&cross_entropy_samples_kernel, Grid{1, kSampleThreads, kSampleThreads / 32 * sizeof(float)}, launch, a);
  if (status == cudaSuccess) status = run_gradient<T, true, kChunks>(a, launch);
  if (status == cudaSuccess) status = run_gradient<T, false, kChunks>(a, launch);
  if (status != cudaSuccess || a.grad_bias == nullptr) return status;
  return run_sum<T>(a.partial_bias, a.largest, a.grad_bias, a.vocab, a.parts_table, launch);
}

template <typename T>
cudaError_t run_backward(const CrossEntropyCudaArgs& a, const Launch& launch) {
  return a.stride <= kTileFeatures ? run_backward<T, 1>(a, launch) : run_backward<T, 2>(a, launch);
}

// Calls run(zero of the element type) on the launch's device.
template <typename Run>
Status dispatch(const CrossEntropyCudaArgs& args, const Launch& launch, Run&& run) {
  if (args.rows == 0 || args.vocab == 0) return cudaSuccess;
  if (args.stride > kCrossEntropyMostFeatures || args.stride % 8 != 0) return cudaErrorInvalidValue;
  int processors = 0;
  const cudaError_t status = enter_device(launch.device, processors);
  if (status != cudaSuccess) return status;
  switch (launch.dtype) {
    case FloatType::bfloat16: return run(__nv_bfloat16{});
    case FloatType::float16: return run(__half{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

Status cross_entropy_forward(const CrossEntropyCudaArgs& args, const Launch& launch) {
  return dispatch(args, launch, [&](auto zero) { return run_forward<decltype(zero)>(args, launch); });
}

Status cross_entropy_backward(const CrossEntropyCudaArgs& args, const Launch& launch) {
  return dispatch(args, launch, [&](auto zero) { return run_backward<decltype(zero)>(args, launch); });
}

}  // namespace cuda
}  // namespace pds
