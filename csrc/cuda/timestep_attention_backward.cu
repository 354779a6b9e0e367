// Backward of timestep attention on CUDA, in two kernels and without atomics, so that the bits repeat. With P the
// probabilities (made again from the scores and the saved log-sum-exp), R the dropout factors, dO the given gradient,
// dP = R (dO V^T), delta_i = dO_i . O_i and dS = scale P (dP - delta):
//   queries: dQ = dS K + dS tau, over tiles of keys;
//   keys, over tiles of queries: dV = (R P)^T dO, dK' = dS^T Q, c_j = sum_i dS_ij, dk = dK' + c u, dtau = dK' + c w; and
//   this block's part of du = sum_j c_j k_j, dw = sum_j c_j tau_j. Here scores lie transposed, [key][query], so that P and dS
//   go from accumulators to fragments without shared memory.
#include "cuda/timestep_attention.cuh"

namespace pds {
namespace cuda {
namespace {

constexpr float kInfinity = INFINITY;

// --- Gradient of the queries ---

template <int D>
struct QueryLayout {   // of shared memory, bytes
  static constexpr int q = 0;
  static constexpr int grad = Tile<D>::bytes(kAttentionRows);
  static constexpr int keys = 2 * Tile<D>::bytes(kAttentionRows);
  static constexpr int biases = keys + 2 * KeyTiles<D, kWalk<D>>::kBytes;
  static constexpr int terms = biases + 2 * D * 4;
  static constexpr int deltas = terms + kWalk<D> * 4;
  static constexpr int total = deltas + kAttentionRows * 4;
};

// deltas[r] = dO . O of the block's rows, two threads a row; stored for the kernel of the keys, too.
template <typename T, int D>
__device__ __forceinline__ void compute_deltas(const TimestepAttentionArgs& a, const Head& head, int first, float* deltas,
                                               float* stored) {
  const int r = threadIdx.x / 2, row = first + r;
  float sum = 0.f;
  if (row < a.queries) {
    const T* grad = row_of<T>(a.grad_out, head, row);
    const T* out = static_cast<const T*>(a.out) + ((head.b * a.queries + row) * a.heads + head.h) * a.dim;
    for (int d = threadIdx.x % 2 * 8; d < a.dim; d += 16) {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(grad + d)), y = __ldg(reinterpret_cast<const uint4*>(out + d));
      const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 g = Mma<T>::unpack(xs[i]), o = Mma<T>::unpack(ys[i]);
        sum += g.x * o.x + g.y * o.y;
      }
    }
  }
  sum += __shfl_xor_sync(kWholeWarp, sum, 1);
  if (threadIdx.x % 2 != 0) return;
  deltas[r] = sum;
  if (row < a.queries) stored[(head.b * a.heads + head.h) * a.queries + row] = sum;
}

template <typename T, int D, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads)
attention_grad_query_kernel(const __grid_constant__ TimestepAttentionArgs a, float* delta, const int64_t* device_seed) {
  constexpr int kKeys = kWalk<D>, kBlocks = kKeys / 8;
  using Layout = QueryLayout<D>;
  using Keys = KeyTiles<D, kKeys>;
  PDS_SHARED_MEMORY(shared);
  float* biases = reinterpret_cast<float*>(shared + Layout::biases);
  float* terms = reinterpret_cast<float*>(shared + Layout::terms);
  float* deltas = reinterpret_cast<float*>(shared + Layout::deltas);
  const SharedAddress q_tile = shared_address(shared + Layout::q), grad_tile = shared_address(shared + Layout::grad);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Head head(static_cast<int>(a.heads), static_cast<int>((a.queries + kAttentionRows - 1) / kAttentionRows));
  const int first = head.tile * kAttentionRows, query = first + 16 * warp + lane / 4;
  const int tiles = static_cast<int>((a.keys + kKeys - 1) / kKeys);
  const float scale = a.scale * kLog2E;
  const DropoutKey dropout(a, device_seed, head);

  float lse[2], grad_q[D / 8][4];
  clear<D / 8>(grad_q);
  load_rows<T, D, kAttentionRows>(q_tile, a.q, head, first, a.queries, a.dim);
  load_rows<T, D, kAttentionRows>(grad_tile, a.grad_out, head, first, a.queries, a.dim);
  const auto load = [&](unsigned char* stage, int j) {
    load_keys<T, D, kKeys>(Keys(shared_address(stage)), a, head, j * kKeys);
  };
  const auto meanwhile = [&] {
    load_biases<T, D>(biases, a, head);
    compute_deltas<T, D>(a, head, first, deltas, delta);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = query + 8 * half;
      lse[half] = row < a.queries ? a.lse[(head.b * a.heads + head.h) * a.queries + row] * kLog2E : kInfinity;
    }
    return true;
  };
  walk_tiles<Keys::kBytes>(shared + Layout::keys, tiles, load, meanwhile, [&](unsigned char* stage, int j) {
    const bool keep = key_terms<T, D, kKeys>(stage, biases, a, head, j * kKeys, scale, terms);
    if (__syncthreads_or(keep) == 0) return;
    const Keys keys(shared_address(stage));
    float scores[kBlocks][4], grad_p[kBlocks][4];
    clear<kBlocks>(scores);
    clear<kBlocks>(grad_p);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t fragment[4];
      Tile<D>::load_a(q_tile, 16 * warp, k, lane, fragment);
      multiply_transposed<T, D, kKeys>(scores, fragment, keys.k, k, lane);
      if (a.tau.data != nullptr) multiply_transposed<T, D, kKeys>(scores, fragment, keys.tau, k, lane);
      Tile<D>::load_a(grad_tile, 16 * warp, k, lane, fragment);
      multiply_transposed<T, D, kKeys>(grad_p, fragment, keys.v, k, lane);
    }
    const uint32_t survive = kDropout ? survivors_by_query<kBlocks>(dropout, query, j * kKeys, lane) : 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float2 term = *reinterpret_cast<const float2*>(terms + 8 * n + 2 * (lane & 3));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float p = fast_exp2(scores[n][e] * scale + ((e & 1) != 0 ? term.y : term.x) - lse[e >> 1]);
        const float factor = !kDropout ? 1.f : (survive >> (4 * n + e) & 1u) != 0 ? dropout.factor : 0.f;
        scores[n][e] = a.scale * p * (grad_p[n][e] * factor - deltas[16 * warp + lane / 4 + 8 * (e >> 1)]);
      }
    }
    multiply_rows<T, D, kKeys>(grad_q, scores, keys.k, lane);
    if (a.tau.data != nullptr) multiply_rows<T, D, kKeys>(grad_q, scores, keys.tau, lane);
  });
  __syncwarp();   // this warp's rows of the q tile are free
  const float factors[2] = {1.f, 1.f};
  store_rows<T, D>(shared + Layout::q, grad_q, factors,
                   static_cast<T*>(a.grad_q) + head.b * a.queries * a.grad_q_token + head.h * a.dim, a.grad_q_token, first,
                   a.queries, a.dim);
}

// --- Gradient of the keys ---

template <int D>
struct KeyLayout {   // of shared memory, bytes
  static constexpr int keys = 0;
  static constexpr int stages = KeyTiles<D, kAttentionRows>::kBytes;
  static constexpr int stage = 2 * Tile<D>::bytes(kWalk<D>) + 2 * kWalk<D> * 4;   // q, dO, log-sum-exp, delta
  static constexpr int biases = stages + 2 * stage;
  static constexpr int terms = biases + 2 * D * 4;
  static constexpr int sums = terms + kAttentionRows * 4;
  static constexpr int total = sums + kAttentionRows * 4;
};

// The tiles of a stage, and its rows' log-sum-exps (+inf for a row that does not exist: probability 0) and deltas.
template <typename T, int D>
__device__ __forceinline__ void load_queries(unsigned char* stage, const TimestepAttentionArgs& a, const float* delta,
                                             const Head& head, int first) {
  constexpr int kRows = kWalk<D>;
  load_rows<T, D, kRows>(shared_address(stage), a.q, head, first, a.queries, a.dim);
  load_rows<T, D, kRows>(shared_address(stage + Tile<D>::bytes(kRows)), a.grad_out, head, first, a.queries, a.dim);
  const int which = threadIdx.x / kRows, row = first + threadIdx.x % kRows;
  if (which >= 2) return;
  float* sum = reinterpret_cast<float*>(stage + 2 * Tile<D>::bytes(kRows)) + threadIdx.x;
  if (row >= a.queries) *sum = which == 0 ? kInfinity : 0.f;
  else copy_word_async(shared_address(sum), (which == 0 ? a.lse : delta) + (head.b * a.heads + head.h) * a.queries + row);
}

// What a warp gathers for its 16 keys.
template <int D>
struct KeyGrads {
  float value[D / 8][4], key[D / 8][4];
  float sum[2] = {0.f, 0.f};   // c_j, of this thread's columns
};

template <typename T, int D, bool kDropout>
__device__ __forceinline__ void add_queries(KeyGrads<D>& grads, const KeyTiles<D, kAttentionRows>& keys,
                                            const unsigned char* stage, const float own_terms[2],
                                            const TimestepAttentionArgs& a, const DropoutKey& dropout, int first_query,
                                            int first_key, int warp, int lane) {
  constexpr int kQueries = kWalk<D>, kBlocks = kQueries / 8;
  const SharedAddress q_tile = shared_address(stage), grad_tile = q_tile + Tile<D>::bytes(kQueries);
  const float* lse = reinterpret_cast<const float*>(stage + 2 * Tile<D>::bytes(kQueries));
  const float scale = a.scale * kLog2E;
  // First, while the accumulators do not take registers yet.
  const uint32_t survive = kDropout ? survivors_by_key<kBlocks>(dropout, first_query, first_key + 16 * warp, lane) : 0;
  float scores[kBlocks][4], grad_p[kBlocks][4];
  clear<kBlocks>(scores);
  clear<kBlocks>(grad_p);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t fragment[4];
    Tile<D>::load_a(keys.k, 16 * warp, k, lane, fragment);
    multiply_transposed<T, D, kQueries>(scores, fragment, q_tile, k, lane);
    if (a.tau.data != nullptr) {
      Tile<D>::load_a(keys.tau, 16 * warp, k, lane, fragment);
      multiply_transposed<T, D, kQueries>(scores, fragment, q_tile, k, lane);
    }
    Tile<D>::load_a(keys.v, 16 * warp, k, lane, fragment);
    multiply_transposed<T, D, kQueries>(grad_p, fragment, grad_tile, k, lane);
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const int column = 8 * n + 2 * (lane & 3);
    const float2 lses = *reinterpret_cast<const float2*>(lse + column);
    const float2 deltas = *reinterpret_cast<const float2*>(lse + kQueries + column);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool odd = (e & 1) != 0;
      const float p = fast_exp2(scores[n][e] * scale + own_terms[e >> 1] - kLog2E * (odd ? lses.y : lses.x));
      const float factor = !kDropout ? 1.f : (survive >> (4 * n + e) & 1u) != 0 ? dropout.factor : 0.f;
      const float grad = a.scale * p * (grad_p[n][e] * factor - (odd ? deltas.y : deltas.x));
      scores[n][e] = p * factor;
      grad_p[n][e] = grad;
      grads.sum[e >> 1] += grad;
    }
  }
  multiply_rows<T, D, kQueries>(grads.value, scores, grad_tile, lane);
  multiply_rows<T, D, kQueries>(grads.key, grad_p, q_tile, lane);
}

// grad_u and grad_w parts of this block: sums over its keys in order, a feature per thread.
template <typename T, int D>
__device__ __forceinline__ void store_bias_grads(const TimestepAttentionArgs& a, const Head& head, int tiles,
                                                 const unsigned char* keys, const float* sums) {
  const int d = threadIdx.x;
  if (d >= a.dim) return;
  const int64_t out = (((head.b * a.heads + head.h) * tiles) + head.tile) * a.dim + d;
  for (int which = 0; which < 2; ++which) {
    float* to = which == 0 ? a.grad_u : a.grad_w;
    if (to == nullptr) continue;
    const unsigned char* tile = keys + which * Tile<D>::bytes(kAttentionRows);
    float total = 0.f;
    for (int r = 0; r < kAttentionRows; ++r)
      total += sums[r] * widen(*reinterpret_cast<const T*>(tile + Tile<D>::offset(r, d / 8) + d % 8 * 2));
    to[out] = total;
  }
}

// c += sum of the row times bias (u or w) of the columns.
template <int D>
__device__ __forceinline__ void add_bias(const float grads[][4], const float sums[2], const float* bias, int lane,
                                         float out[][4]) {
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) out[i][e] = grads[i][e] + sums[e >> 1] * bias[8 * i + 2 * (lane & 3) + (e & 1)];
}

// Gradients of tau as float, for a table.
template <int D>
__device__ __forceinline__ void store_float_rows(const TimestepAttentionArgs& a, const Head& head, const float c[][4],
                                                 int first, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + lane / 4 + 8 * half;
    if (row >= a.keys) continue;
    float* out = a.grad_tau_rows + ((head.b * a.keys + row) * a.heads + head.h) * a.dim;
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      if (8 * i < a.dim)
        *reinterpret_cast<float2*>(out + 8 * i + 2 * (lane & 3)) = make_float2(c[i][2 * half], c[i][2 * half + 1]);
  }
}

template <typename T, int D>
__device__ __forceinline__ void store_key_grads(const TimestepAttentionArgs& a, const Head& head, KeyGrads<D>& grads,
                                                unsigned char* shared, const float* biases, int first, int warp, int lane) {
  const float factors[2] = {1.f, 1.f};
  const int64_t stride = a.grad_k_token, offset = head.b * a.keys * stride + head.h * a.dim, contiguous = a.heads * a.dim;
  unsigned char* tiles[3] = {shared, shared + Tile<D>::bytes(kAttentionRows), shared + 2 * Tile<D>::bytes(kAttentionRows)};
  store_rows<T, D>(tiles[2], grads.value, factors, static_cast<T*>(a.grad_v) + offset, stride, first, a.keys, a.dim);
  float shifted[D / 8][4];
  add_bias<D>(grads.key, grads.sum, biases, lane, shifted);
  store_rows<T, D>(tiles[0], shifted, factors, static_cast<T*>(a.grad_k) + offset, stride, first, a.keys, a.dim);
  if (a.grad_tau == nullptr && a.grad_tau_rows == nullptr) return;
  add_bias<D>(grads.key, grads.sum, biases + D, lane, shifted);
  if (a.grad_tau_rows != nullptr) store_float_rows<D>(a, head, shifted, first + 16 * warp, lane);
  else store_rows<T, D>(tiles[1], shifted, factors, static_cast<T*>(a.grad_tau) + head.b * a.keys * contiguous + head.h * a.dim,
                        contiguous, first, a.keys, a.dim);
}

template <typename T, int D, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads)
attention_grad_key_kernel(const __grid_constant__ TimestepAttentionArgs a, const float* delta, const int64_t* device_seed) {
  constexpr int kQueries = kWalk<D>;
  using Layout = KeyLayout<D>;
  PDS_SHARED_MEMORY(shared);
  float* biases = reinterpret_cast<float*>(shared + Layout::biases);
  float* terms = reinterpret_cast<float*>(shared + Layout::terms);
  float* sums = reinterpret_cast<float*>(shared + Layout::sums);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int key_tiles = static_cast<int>((a.keys + kAttentionRows - 1) / kAttentionRows);
  const Head head(static_cast<int>(a.heads), key_tiles);
  const int first = head.tile * kAttentionRows;
  const KeyTiles<D, kAttentionRows> keys(shared_address(shared + Layout::keys));
  const DropoutKey dropout(a, device_seed, head);

  float own_terms[2];
  KeyGrads<D> grads;
  clear<D / 8>(grads.value);
  clear<D / 8>(grads.key);
  load_keys<T, D, kAttentionRows>(keys, a, head, first);
  commit_copies();
  load_biases<T, D>(biases, a, head);
  const auto load = [&](unsigned char* stage, int i) { load_queries<T, D>(stage, a, delta, head, i * kQueries); };
  const auto meanwhile = [&] {   // of keys that the mask removes the queries are not read, but for the first tile
    wait_copies<1>();
    __syncthreads();
    const bool keep =
        key_terms<T, D, kAttentionRows>(shared + Layout::keys, biases, a, head, first, a.scale * kLog2E, terms);
    const bool any = __syncthreads_or(keep) != 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) own_terms[half] = terms[16 * warp + lane / 4 + 8 * half];
    return any;
  };
  walk_tiles<Layout::stage>(shared + Layout::stages, static_cast<int>((a.queries + kQueries - 1) / kQueries), load, meanwhile,
                            [&](unsigned char* stage, int i) {
    add_queries<T, D, kDropout>(grads, keys, stage, own_terms, a, dropout, i * kQueries, first, warp, lane);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    grads.sum[half] = sum_over_quad(grads.sum[half]);
    if ((lane & 3) == 0) sums[16 * warp + lane / 4 + 8 * half] = grads.sum[half];
  }
  __syncthreads();
  store_bias_grads<T, D>(a, head, key_tiles, shared + Layout::keys, sums);
  __syncthreads();   // the tiles of the keys become the way out
  store_key_grads<T, D>(a, head, grads, shared + Layout::keys, biases, first, warp, lane);
}

template <bool kDropout>
Status run_backward(const TimestepAttentionArgs& args, float* delta, const int64_t* device_seed, const Launch& launch) {
  return for_type_and_dim(launch.dtype, args.dim, [&](auto zero, auto dim) {
    using T = decltype(zero);
    constexpr int D = decltype(dim)::value;
    const int64_t heads = args.batch * args.heads;
    const Grid queries{heads * attention_tiles(args.queries), kAttentionThreads, QueryLayout<D>::total};
    const cudaError_t status =
        start(&attention_grad_query_kernel<T, D, kDropout>, queries, launch, args, delta, device_seed);
    if (status != cudaSuccess) return status;
    const Grid keys{heads * attention_tiles(args.keys), kAttentionThreads, KeyLayout<D>::total};
    return start(&attention_grad_key_kernel<T, D, kDropout>, keys, launch, args, delta, device_seed);
  });
}

}  // namespace

Status timestep_attention_backward(const TimestepAttentionArgs& args, float* delta, const int64_t* device_seed,
                                   const Launch& launch) {
  int processors = 0;
  const cudaError_t status = enter_device(launch.device, processors);
  if (status != cudaSuccess) return status;
  return args.drop_threshold == 0 ? run_backward<false>(args, delta, device_seed, launch)
                                  : run_backward<true>(args, delta, device_seed, launch);
}

}  // namespace cuda
}  // namespace pds
