// Forward of timestep attention on CUDA: online softmax over tiles of keys, nothing of size queries x keys in memory.
#include "cuda/timestep_attention.cuh"

namespace pds {
namespace cuda {
namespace {

template <int D>
struct ForwardLayout {   // of shared memory, bytes
  static constexpr int q = 0;
  static constexpr int biases = Tile<D>::bytes(kAttentionRows);
  static constexpr int terms = biases + 2 * D * 4;
  static constexpr int keys = terms + kWalk<D> * 4;
  static constexpr int total(int64_t stages) { return keys + static_cast<int>(stages) * KeyTiles<D, kWalk<D>>::kBytes; }
};

// Running softmax of the two rows of a thread, in units of log 2.
struct Softmax {
  float top[2] = {-3.402823466e+38f, -3.402823466e+38f};
  float sum[2] = {0.f, 0.f};   // of this thread's columns

  // scores -> exp2(score - top), out rescaled to the new top.
  template <int kBlocks, int kOut>
  __device__ __forceinline__ void update(float scores[kBlocks][4], float out[kOut][4], const float* terms, float scale,
                                         int lane) {
    float now[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float2 term = *reinterpret_cast<const float2*>(terms + 8 * n + 2 * (lane & 3));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[n][e] = scores[n][e] * scale + ((e & 1) != 0 ? term.y : term.x);
        now[e >> 1] = fmaxf(now[e >> 1], scores[n][e]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      now[half] = fmaxf(now[half], __shfl_xor_sync(kWholeWarp, now[half], 1));
      now[half] = fmaxf(now[half], __shfl_xor_sync(kWholeWarp, now[half], 2));
      const float shrink = fast_exp2(top[half] - now[half]);
      top[half] = now[half];
      sum[half] *= shrink;
#pragma unroll
      for (int i = 0; i < kOut; ++i) {
        out[i][2 * half] *= shrink;
        out[i][2 * half + 1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[n][e] = fast_exp2(scores[n][e] - top[e >> 1]);
        sum[e >> 1] += scores[n][e];
      }
  }
};

// What fits into the registers without spills.
template <int D, Form kForm>
constexpr int kBlocksPerProcessor = D <= 64 ? 4 : 3;

template <typename T, int D, Form kForm>
__global__ void __launch_bounds__(kAttentionThreads, kBlocksPerProcessor<D, kForm>)
attention_forward_kernel(const __grid_constant__ TimestepAttentionArgs a, const int64_t* device_seed) {
  constexpr int kKeys = kWalk<D>, kBlocks = kKeys / 8;
  using Layout = ForwardLayout<D>;
  using Keys = KeyTiles<D, kKeys>;
  PDS_SHARED_MEMORY(shared);
  float* biases = reinterpret_cast<float*>(shared + Layout::biases);
  float* terms = reinterpret_cast<float*>(shared + Layout::terms);
  const SharedAddress q_tile = shared_address(shared + Layout::q);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Head head(a, a.queries);
  const int first = head.tile * kAttentionRows, query = first + 16 * warp + lane / 4;
  if (first >= head.queries) return;
  const DropoutKey dropout(a, device_seed, head);

  float out[D / 8][4];
  Softmax softmax;
  clear<D / 8>(out);
  load_rows<T, D, kAttentionRows>(q_tile, query_rows<T>(a, a.q, head), first, a.dim);
  const auto load = [&](unsigned char* stage, int j) {
    load_keys<T, D, kKeys>(Keys(shared_address(stage)), a, head.anew(), j * kKeys);
  };
  const auto meanwhile = [&] {
    load_biases<T, D>(biases, a, head);
    return true;
  };
  walk_tiles<Keys::kBytes>(shared + Layout::keys, (head.keys + kKeys - 1) / kKeys, load, meanwhile,
                           [&](unsigned char* stage, int j) {
    if (!begin_keys<T, D, kForm>(stage, shared + Layout::q, a, head, first, j, biases, terms)) return;
    const Keys keys(shared_address(stage));
    float scores[kBlocks][4];
    clear<kBlocks>(scores);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t q[4];   // again for every tile: kept, they would take too many registers
      Tile<D>::load_a(q_tile, 16 * warp, k, lane, q);
      multiply_transposed<T, D, kKeys>(scores, q, keys.k, k, lane);
      if (adds_time<kForm>(a)) multiply_transposed<T, D, kKeys>(scores, q, keys.tau, k, lane);
    }
    softmax.template update<kBlocks, D / 8>(scores, out, terms, a.scale * kLog2E, lane);
    if (drops(kForm)) {
      const uint32_t survive = survivors_by_query<kForm, kBlocks>(dropout, query, j * kKeys, lane);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[n][e] = (survive >> (4 * n + e) & 1u) != 0 ? scores[n][e] : 0.f;
    }
    multiply_rows<T, D, kKeys>(out, scores, keys.v, lane);
  });
  __syncthreads();   // without keys nobody has waited yet: what others copied into a warp's rows is there before its results

  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_over_quad(softmax.sum[half]);
    factors[half] = sum == 0.f ? 0.f : (drops(kForm) ? dropout.factor() : 1.f) / sum;
    const int row = query + 8 * half;
    if ((lane & 3) == 0 && row < head.queries)
      a.lse[head.sum_at(a.heads, row)] =
          sum == 0.f ? __int_as_float(0xFF800000) : (softmax.top[half] + log2f(sum)) * kLn2;
  }
  store_rows<T, D>(shared + Layout::q, out, factors, static_cast<T*>(a.out) + (head.first_query * a.heads + head.h) * a.dim,
                   a.heads * a.dim, first, head.queries, a.dim);
}

}  // namespace

Status timestep_attention_forward(const TimestepAttentionArgs& args, const int64_t* device_seed, const Launch& launch) {
  int processors = 0;
  const cudaError_t status = enter_device(launch.device, processors);
  if (status != cudaSuccess) return status;
  return for_kernel(args, launch.dtype, [&](auto zero, auto dim, auto form) {
    using T = decltype(zero);
    constexpr int D = decltype(dim)::value;
    const int64_t stages = args.keys <= kWalk<D> ? 1 : 2;   // one tile needs no second place: more blocks fit
    const Grid grid{args.batch * args.heads * attention_tiles(args.queries), kAttentionThreads,
                    static_cast<size_t>(ForwardLayout<D>::total(stages))};
    return start(&attention_forward_kernel<T, D, decltype(form)::value>, grid, launch, args, device_seed);
  });
}

}  // namespace cuda
}  // namespace pds
