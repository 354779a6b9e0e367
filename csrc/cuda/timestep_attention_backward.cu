// Backward of timestep attention on CUDA without atomics, so that the bits repeat: one kernel for short sentences
// (timestep_attention_short.cu), two for long ones, where
//   the gradient of the queries, over tiles of keys, has its scores as [query][key];
//   that of the keys, over tiles of queries, has them transposed and takes each row's log-sum-exp and delta.
#include "cuda/timestep_attention_gradients.cuh"

namespace pds {
namespace cuda {
namespace {

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
  if (row < head.queries) {
    const T* grad = query_rows<T>(a, a.grad_out, head)[row];
    const T* out = static_cast<const T*>(a.out) + ((head.first_query + row) * a.heads + head.h) * a.dim;
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
  if (row < head.queries) stored[head.sum_at(a.heads, row)] = sum;
}

// Asked for where ptxas would choose fewer registers and spill; 0: its own choice.
template <int D, Form kForm>
constexpr int kQueryBlocks = kForm == Form::rotary ? 2 : D == 32 || D == 96 ? 3 - kFewerBlocks : 0;

template <typename T, int D, Form kForm>
__global__ void __launch_bounds__(kAttentionThreads, kQueryBlocks<D, kForm>)
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
  const Head head(a, a.queries);
  const int first = head.tile * kAttentionRows, query = first + 16 * warp + lane / 4;
  if (first >= head.queries) return;
  const DropoutKey dropout(a, device_seed, head);

  float lse[2], grad_q[D / 8][4];
  clear<D / 8>(grad_q);
  load_rows<T, D, kAttentionRows>(q_tile, query_rows<T>(a, a.q, head), first, a.dim);
  load_rows<T, D, kAttentionRows>(grad_tile, query_rows<T>(a, a.grad_out, head), first, a.dim);
  const auto load = [&](unsigned char* stage, int j) {
    load_keys<T, D, kKeys>(Keys(shared_address(stage)), a, head.anew(), j * kKeys);
  };
  const auto meanwhile = [&] {
    load_biases<T, D>(biases, a, head);
    compute_deltas<T, D>(a, head, first, deltas, delta);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + 8 * half;
      lse[half] = row < head.queries ? a.lse[head.sum_at(a.heads, row)] * kLog2E : kInfinity;
    }
    return true;
  };
  walk_tiles<Keys::kBytes>(shared + Layout::keys, (head.keys + kKeys - 1) / kKeys, load, meanwhile,
                           [&](unsigned char* stage, int j) {
    if (!begin_keys<T, D, kForm>(stage, shared + Layout::q, a, head, first, j, biases, terms)) return;
    const Keys keys(shared_address(stage));
    float scores[kBlocks][4], grad_p[kBlocks][4];
    clear<kBlocks>(scores);
    clear<kBlocks>(grad_p);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t fragment[4];
      Tile<D>::load_a(q_tile, 16 * warp, k, lane, fragment);
      multiply_transposed<T, D, kKeys>(scores, fragment, keys.k, k, lane);
      if (adds_time<kForm>(a)) multiply_transposed<T, D, kKeys>(scores, fragment, keys.tau, k, lane);
      Tile<D>::load_a(grad_tile, 16 * warp, k, lane, fragment);
      multiply_transposed<T, D, kKeys>(grad_p, fragment, keys.v, k, lane);
    }
    const uint32_t survive = survivors_by_query<kForm, kBlocks>(dropout, query, j * kKeys, lane);
    const float survivors = drops(kForm) ? dropout.factor() : 1.f;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float2 term = *reinterpret_cast<const float2*>(terms + 8 * n + 2 * (lane & 3));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float p = fast_exp2(scores[n][e] * (a.scale * kLog2E) + ((e & 1) != 0 ? term.y : term.x) - lse[e >> 1]);
        const float factor = survivor_factor<kForm>(survivors, survive, 4 * n + e);
        scores[n][e] = a.scale * p * (grad_p[n][e] * factor - deltas[16 * warp + lane / 4 + 8 * (e >> 1)]);
      }
    }
    multiply_rows<T, D, kKeys>(grad_q, scores, keys.k, lane);
    if (adds_time<kForm>(a)) multiply_rows<T, D, kKeys>(grad_q, scores, keys.tau, lane);
  });
  __syncthreads();   // without keys nobody has waited yet: what others copied into a warp's rows is there before its results
  GradientStore<T, D, kForm>{a, head, first}.query(shared + Layout::q, grad_q);
  if (kForm == Form::rotary) share_rotation_grads<D, true>(a, head, grad_q, first + 16 * warp, lane);
}

// --- Gradient of the keys ---

constexpr int kQueryWalk = 32;   // queries of a tile: the two accumulators of dimension D leave no registers for more

template <int D>
struct KeyLayout {   // of shared memory, bytes
  static constexpr int keys = 0;
  static constexpr int stages = KeyTiles<D, kAttentionRows>::kBytes;
  static constexpr int stage = 2 * Tile<D>::bytes(kQueryWalk) + 2 * kQueryWalk * 4;   // q, dO, log-sum-exp, delta
  static constexpr int biases = stages + 2 * stage;
  static constexpr int terms = biases + 2 * D * 4;
  static constexpr int sums = terms + kAttentionRows * 4;
  static constexpr int total = sums + kAttentionRows * 4;
};

// The tiles of a stage, and its rows' log-sum-exps (+inf for a row that does not exist: probability 0) and deltas.
template <typename T, int D>
__device__ __forceinline__ void load_queries(unsigned char* stage, const TimestepAttentionArgs& a, const float* delta,
                                             const Head& head, int first) {
  constexpr int kRows = kQueryWalk;
  load_rows<T, D, kRows>(shared_address(stage), query_rows<T>(a, a.q, head), first, a.dim);
  load_rows<T, D, kRows>(shared_address(stage + Tile<D>::bytes(kRows)), query_rows<T>(a, a.grad_out, head), first, a.dim);
  const int which = threadIdx.x / kRows, row = first + threadIdx.x % kRows;
  if (which >= 2) return;
  float* sum = reinterpret_cast<float*>(stage + 2 * Tile<D>::bytes(kRows)) + threadIdx.x;
  if (row >= head.queries) *sum = which == 0 ? kInfinity : 0.f;
  else copy_word_async(shared_address(sum), (which == 0 ? a.lse : delta) + head.sum_at(a.heads, row));
}

// What a warp gathers for its 16 keys.
template <int D>
struct KeyGrads {
  float value[D / 8][4], key[D / 8][4];
  float sum[2] = {0.f, 0.f};   // c_j, of this thread's columns
};

template <typename T, int D, Form kForm>
__device__ __forceinline__ void add_queries(KeyGrads<D>& grads, const KeyTiles<D, kAttentionRows>& keys,
                                            const unsigned char* stage, const float* terms,
                                            const TimestepAttentionArgs& a, const DropoutKey& dropout, int first_query,
                                            int first_key, int warp, int lane) {
  constexpr int kQueries = kQueryWalk, kBlocks = kQueries / 8;
  const SharedAddress q_tile = shared_address(stage), grad_tile = q_tile + Tile<D>::bytes(kQueries);
  const float* lse = reinterpret_cast<const float*>(stage + 2 * Tile<D>::bytes(kQueries));
  // First, while the accumulators do not take registers yet.
  const uint32_t survive = survivors_by_key<kForm, kBlocks>(dropout, first_query, first_key + 16 * warp, lane);
  float p[kBlocks][4], grad_p[kBlocks][4];
  multiply_scores<T, D, kQueries>(p, grad_p, keys, adds_time<kForm>(a), q_tile, grad_tile, warp, lane);
  const float survivors = drops(kForm) ? dropout.factor() : 1.f;
  const float own_terms[2] = {terms[16 * warp + lane / 4], terms[16 * warp + lane / 4 + 8]};
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    probabilities<kForm>(n, p[n], grad_p[n], own_terms, lse, a.scale * kLog2E, survivors, survive, lane);
    score_gradients<kForm>(n, p[n], grad_p[n], lse + kQueries, a.scale, survivors, survive, grads.sum, lane);
  }
  multiply_rows<T, D, kQueries>(grads.value, p, grad_tile, lane);
  multiply_rows<T, D, kQueries>(grads.key, grad_p, q_tile, lane);
}

// What fits into the registers without spills.
template <int D, Form kForm>
constexpr int kKeyBlocks = kForm != Form::rotary && D <= (kForm == Form::plain ? 64 : 32) ? 3 - kFewerBlocks : 2;

template <typename T, int D, Form kForm>
__global__ void __launch_bounds__(kAttentionThreads, kKeyBlocks<D, kForm>)
attention_grad_key_kernel(const __grid_constant__ TimestepAttentionArgs a, const float* delta, const int64_t* device_seed) {
  constexpr int kQueries = kQueryWalk;
  using Layout = KeyLayout<D>;
  PDS_SHARED_MEMORY(shared);
  float* biases = reinterpret_cast<float*>(shared + Layout::biases);
  float* terms = reinterpret_cast<float*>(shared + Layout::terms);
  float* sums = reinterpret_cast<float*>(shared + Layout::sums);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Head head(a, a.keys);
  const int first = head.tile * kAttentionRows;
  if (first >= head.keys) return;
  const KeyTiles<D, kAttentionRows> keys(shared_address(shared + Layout::keys));
  const DropoutKey dropout(a, device_seed, head);

  KeyGrads<D> grads;
  clear<D / 8>(grads.value);
  clear<D / 8>(grads.key);
  load_keys<T, D, kAttentionRows>(keys, a, head, first);
  commit_copies();
  load_biases<T, D>(biases, a, head);
  const auto load = [&](unsigned char* stage, int i) { load_queries<T, D>(stage, a, delta, head.anew(), i * kQueries); };
  const auto meanwhile = [&] {   // of keys that the mask removes the queries are not read, but for the first tile
    wait_copies<1>();
    __syncthreads();
    if (kForm == Form::rotary) rotate_keys<T, D, kAttentionRows>(shared + Layout::keys, a);
    return __syncthreads_or(key_terms<T, D, kAttentionRows>(shared + Layout::keys, biases, a, head, first, terms)) != 0;
  };
  walk_tiles<Layout::stage>(shared + Layout::stages, (head.queries + kQueries - 1) / kQueries, load, meanwhile,
                            [&](unsigned char* stage, int i) {
    if (kForm == Form::rotary) {
      rotate_queries<T, D, kQueries>(stage, a, head.anew(), i * kQueries);
      __syncthreads();
    }
    add_queries<T, D, kForm>(grads, keys, stage, terms, a, dropout, i * kQueries, first, warp, lane);
  });
  const Head after(a, a.keys, computed_anew(blockIdx.x));   // the loop has no registers to spare for what follows it
  const GradientStore<T, D, kForm> store{a, after, after.tile * kAttentionRows};
  unsigned char* tile = shared + Layout::keys + 2 * Tile<D>::bytes(kAttentionRows);   // each warp has had its rows of v
  if (kForm == Form::rotary) {
    store.value(tile, grads.value);
    store.key(tile, grads.key);
    add<D / 8>(grads.key, grads.value);
    share_rotation_grads<D, false>(a, after, grads.key, first + 16 * warp, lane);
    return store_rotation_grads<T, D>(tile, grads.key, a, after, first, warp, lane);
  }
  store_sums(grads.sum, sums, warp, lane);
  __syncthreads();
  store_bias_grads<T, D>(a, after, shared + Layout::keys, sums);
  store.value(tile, grads.value);
  store.key_and_time(tile, grads.key, grads.sum, biases, warp, lane);
}

}  // namespace

Status timestep_attention_backward(const TimestepAttentionArgs& args, float* delta, const int64_t* device_seed,
                                   const Launch& launch) {
  int processors = 0;
  const cudaError_t status = enter_device(launch.device, processors);
  if (status != cudaSuccess) return status;
  if (is_short(args)) return timestep_attention_backward_short(args, device_seed, launch);
  return for_kernel(args, launch.dtype, [&](auto zero, auto dim, auto form) {
    using T = decltype(zero);
    constexpr int D = decltype(dim)::value;
    constexpr Form kForm = decltype(form)::value;
    const int64_t heads = args.batch * args.heads;
    const Grid queries{heads * attention_tiles(args.queries), kAttentionThreads, QueryLayout<D>::total};
    const cudaError_t done = start(&attention_grad_query_kernel<T, D, kForm>, queries, launch, args, delta, device_seed);
    if (done != cudaSuccess) return done;
    const Grid keys{heads * attention_tiles(args.keys), kAttentionThreads, KeyLayout<D>::total};
    return start(&attention_grad_key_kernel<T, D, kForm>, keys, launch, args, delta, device_seed);
  });
}

}  // namespace cuda
}  // namespace pds
