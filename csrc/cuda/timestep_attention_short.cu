// Backward of timestep attention for sentences of at most 64 queries and keys: a block has all of a head in shared memory and
// makes every gradient from one set of scores. Deltas are sums of P dP, so the output is not read.
#include "cuda/timestep_attention_gradients.cuh"

namespace pds {
namespace cuda {
namespace {

constexpr int kRows = kAttentionRows, kWarps = kAttentionThreads / 32;

template <int D>
struct ShortLayout {   // of shared memory, bytes
  static constexpr int q = 0;
  static constexpr int grad = Tile<D>::bytes(kRows);
  static constexpr int keys = 2 * Tile<D>::bytes(kRows);
  static constexpr int scores = keys + KeyTiles<D, kRows>::kBytes;   // dS, [key][query]
  static constexpr int biases = scores + Tile<kRows>::bytes(kRows);
  static constexpr int terms = biases + 2 * D * 4;
  static constexpr int lse = terms + kRows * 4;
  static constexpr int deltas = lse + kRows * 4;
  static constexpr int sums = deltas + kRows * 4;
  static constexpr int total = sums + kRows * 4;
  static constexpr int parts = scores;   // of the deltas, a row per warp, before dS
};

template <typename T, int D>
__device__ __forceinline__ void load_sentence(unsigned char* shared, const TimestepAttentionArgs& a, const Head& head) {
  using Layout = ShortLayout<D>;
  load_rows<T, D, kRows>(shared_address(shared + Layout::q), query_rows<T>(a, a.q, head), 0, a.dim);
  load_rows<T, D, kRows>(shared_address(shared + Layout::grad), query_rows<T>(a, a.grad_out, head), 0, a.dim);
  load_keys<T, D, kRows>(KeyTiles<D, kRows>(shared_address(shared + Layout::keys)), a, head, 0);
  float* lse = reinterpret_cast<float*>(shared + Layout::lse);
  const int row = threadIdx.x;
  if (row < head.queries) copy_word_async(shared_address(lse + row), a.lse + head.sum_at(a.heads, row));
  else if (row < kRows) lse[row] = kInfinity;   // probability 0
  commit_copies();
}

// Without keys everything is 0, whatever the queries hold.
template <int D>
__device__ __forceinline__ void forget_queries(unsigned char* shared) {
  using Layout = ShortLayout<D>;
  for (int i = threadIdx.x; i < Layout::keys / 16; i += kAttentionThreads)
    reinterpret_cast<uint4*>(shared)[i] = uint4{0, 0, 0, 0};
  if (threadIdx.x < kRows) reinterpret_cast<float*>(shared + Layout::lse)[threadIdx.x] = kInfinity;
  __syncthreads();
}

// deltas[i] = sum_j P_ij dP_ij, over the keys of a warp and then over the warps, in order.
template <int D>
__device__ __forceinline__ void sum_deltas(unsigned char* shared, const float p[][4], const float grad_p[][4], int warp,
                                           int lane) {
  float* parts = reinterpret_cast<float*>(shared + ShortLayout<D>::parts);
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = p[n][e] * grad_p[n][e] + p[n][e + 2] * grad_p[n][e + 2];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, mask);
      if (lane < 4) parts[kRows * warp + 8 * n + 2 * lane + e] = sum;
    }
  __syncthreads();
  if (threadIdx.x < kRows) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += parts[kRows * i + threadIdx.x];
    reinterpret_cast<float*>(shared + ShortLayout<D>::deltas)[threadIdx.x] = sum;
  }
  __syncthreads();
}

// c += dS^T x tile for the warp's keys, or dS x tile for its queries.
template <typename T, int D, bool kQueries>
__device__ __forceinline__ void multiply_gradients(float c[][4], SharedAddress scores, SharedAddress tile, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    uint32_t fragment[4];
    if (kQueries) Tile<kRows>::load_a_transposed(scores, 16 * warp, k, lane, fragment);
    else Tile<kRows>::load_a(scores, 16 * warp, k, lane, fragment);
    multiply_fragment<T, D>(c, fragment, tile, k, lane);
  }
}

template <typename T, int D, Form kForm>
__global__ void __launch_bounds__(kAttentionThreads)
attention_grad_short_kernel(const __grid_constant__ TimestepAttentionArgs a, const int64_t* device_seed) {
  constexpr int kBlocks = kRows / 8;
  using Layout = ShortLayout<D>;
  PDS_SHARED_MEMORY(shared);
  float* biases = reinterpret_cast<float*>(shared + Layout::biases);
  float* terms = reinterpret_cast<float*>(shared + Layout::terms);
  float* sums = reinterpret_cast<float*>(shared + Layout::sums);
  const float *lse = reinterpret_cast<const float*>(shared + Layout::lse),
              *deltas = reinterpret_cast<const float*>(shared + Layout::deltas);
  const SharedAddress q_tile = shared_address(shared + Layout::q), grad_tile = shared_address(shared + Layout::grad);
  const SharedAddress scores = shared_address(shared + Layout::scores);
  const KeyTiles<D, kRows> keys(shared_address(shared + Layout::keys));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Head head(a, kRows);
  const DropoutKey dropout(a, device_seed, head);
  const bool tau = adds_time<kForm>(a);

  load_sentence<T, D>(shared, a, head);
  load_biases<T, D>(biases, a, head);
  const uint32_t survive = survivors_by_key<kForm, kBlocks>(dropout, 0, 16 * warp, lane);
  wait_copies<0>();
  __syncthreads();
  if (kForm == Form::rotary) {
    rotate_queries<T, D, kAttentionRows>(shared + Layout::q, a, head, 0);
    rotate_keys<T, D, kRows>(shared + Layout::keys, a);
  }
  if (__syncthreads_or(key_terms<T, D, kRows>(shared + Layout::keys, biases, a, head, 0, terms)) == 0)
    forget_queries<D>(shared);

  float own_sums[2] = {0.f, 0.f}, grads[D / 8][4], rotations[D / 8][4];
  clear<D / 8>(grads);
  {
    const float own_terms[2] = {terms[16 * warp + lane / 4], terms[16 * warp + lane / 4 + 8]}, ones[2] = {1.f, 1.f};
    const float survivors = drops(kForm) ? dropout.factor() : 1.f;
    float p[kBlocks][4], grad_p[kBlocks][4];
    multiply_scores<T, D, kRows>(p, grad_p, keys, tau, q_tile, grad_tile, warp, lane);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
      probabilities<kForm>(n, p[n], grad_p[n], own_terms, lse, a.scale * kLog2E, survivors, survive, lane);
    sum_deltas<D>(shared, p, grad_p, warp, lane);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
      score_gradients<kForm>(n, p[n], grad_p[n], deltas, a.scale, survivors, survive, own_sums, lane);
    put_rows<T, kRows>(shared + Layout::scores, grad_p, ones);
    multiply_rows<T, D, kRows>(grads, p, grad_tile, lane);
  }
  store_sums(own_sums, sums, warp, lane);
  __syncthreads();   // dS and its sums are there

  const Head late = head.anew();
  const GradientStore<T, D, kForm> store{a, late, 0};
  unsigned char* way_out = shared + Layout::keys + 2 * Tile<D>::bytes(kRows);   // each warp has had its rows of v
  store.value(way_out, grads);
  if (kForm == Form::rotary) copy<D / 8>(rotations, grads);

  clear<D / 8>(grads);
  multiply_gradients<T, D, false>(grads, scores, q_tile, warp, lane);
  if (kForm == Form::rotary) {
    store.key(way_out, grads);
    add<D / 8>(rotations, grads);
  } else {
    store.key_and_time(way_out, grads, own_sums, biases, warp, lane);
    store_bias_grads<T, D>(a, late, shared + Layout::keys, sums);
  }

  clear<D / 8>(grads);
  multiply_gradients<T, D, true>(grads, scores, keys.k, warp, lane);
  if (tau) multiply_gradients<T, D, true>(grads, scores, keys.tau, warp, lane);
  store.query(way_out, grads);
  if (kForm == Form::rotary) {
    add<D / 8>(rotations, grads);
    store_rotation_grads<T, D>(way_out, rotations, a, late, 0, warp, lane);
  }
}

}  // namespace

Status timestep_attention_backward_short(const TimestepAttentionArgs& args, const int64_t* device_seed, const Launch& launch) {
  return for_kernel(args, launch.dtype, [&](auto zero, auto dim, auto form) {
    using T = decltype(zero);
    constexpr int D = decltype(dim)::value;
    constexpr Form kForm = decltype(form)::value;
    if constexpr (has_short_kernel(kForm, D)) {
      const Grid grid{args.batch * args.heads, kAttentionThreads, ShortLayout<D>::total};
      return start(&attention_grad_short_kernel<T, D, kForm>, grid, launch, args, device_seed);
    }
    return static_cast<cudaError_t>(cudaErrorInvalidValue);
  });
}

}  // namespace cuda
}  // namespace pds
