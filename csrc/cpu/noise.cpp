// Noise injection, the sampler's update and their backward passes. One token (a row of d elements) is one unit of work.
#include "common/noise.h"

#include <algorithm>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/philox_simd.h"

namespace pds {
namespace PDS_ISA {
namespace {

constexpr int64_t kGrainElements = 4096;   // about 2 us of normals: more than handing out a task costs

int64_t grain(int64_t d) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, d)); }

void set_coordinates(Philox& philox, const NoiseKey& key, NoiseStream stream, int64_t sentence) {
  const int64_t row = key.rows == nullptr ? sentence : key.rows[sentence];
  philox.counter1 = stream_word(stream, key.step);
  philox.counter2 = static_cast<uint32_t>(row);
  philox.counter3 = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
}

// The first Philox block of token n: every token starts at a block of its own, so that only n and d matter.
uint32_t first_block(int64_t n, int64_t d) { return static_cast<uint32_t>(n * ((d + 3) / 4)); }

// Calls body(offset, noise vector, count) for each vector of the token; count < kWidth only at the end.
template <typename F>
PDS_INLINE void for_each_normal_vector(const Philox& philox, uint32_t block, int64_t d, F&& body) {
  vfloat normals[4];
  int64_t j = 0;
  for (; j + kBlockNormals <= d; j += kBlockNormals, block += kBlocks) {
    normal_vectors(philox, block, normals);
    for (int q = 0; q < 4; ++q) body(j + q * kWidth, normals[q], kWidth);
  }
  if (j == d) return;
  normal_vectors(philox, block, normals);
  for (int q = 0; q < 4 && j < d; ++q, j += kWidth) {
    body(j, normals[q], static_cast<int>(std::min<int64_t>(kWidth, d - j)));
  }
}

template <typename T>
PDS_INLINE vfloat load_some(const T* p, int count) {
  if (__builtin_expect(count == kWidth, 1)) return load(p);
  vfloat x{};
  for (int i = 0; i < count; ++i) x[i] = to_float(p[i]);
  return x;
}

template <typename T>
PDS_INLINE void store_some(T* p, vfloat x, int count) {
  if (__builtin_expect(count == kWidth, 1)) return store(p, x);
  for (int i = 0; i < count; ++i) from_float(p[i], x[i]);
}

void note_bad(int64_t* where, int64_t token) { __atomic_store_n(where, token, __ATOMIC_RELAXED); }

bool inside(int64_t index, int64_t size) { return static_cast<uint64_t>(index) < static_cast<uint64_t>(size); }

bool clean(const uint8_t* mask, int64_t token) { return mask != nullptr && mask[token] == 0; }

// x0 = table[id] + sigma0 eps', rounded to T before it is used: x_t is what q_sample makes of the stored x0.
template <typename T>
void embed_token(const QSampleArgs& args, Philox& philox, int64_t sentence, int64_t n, const T* source, T* x0) {
  if (args.sigma0 == 0.f) {
    std::memcpy(x0, source, sizeof(T) * args.d);
    return;
  }
  set_coordinates(philox, args.key, NoiseStream::x_0, sentence);
  const vfloat sigma0 = splat(args.sigma0);
  for_each_normal_vector(philox, first_block(n, args.d), args.d, [&](int64_t offset, vfloat noise, int count) {
    store_some(x0 + offset, fused(sigma0, noise, load_some(source + offset, count)), count);
  });
}

// The same for noise that drifts to args.absorbing.
template <typename T>
void absorb_token(const QSampleArgs& args, const Philox& philox, int64_t token, int64_t t, const T* x0, T* x_t, T* eps) {
  const int64_t n = token % args.N, d = args.d;
  const T* absorbing = static_cast<const T*>(args.absorbing);
  const bool gone = args.gone != nullptr && args.gone[token] != 0;
  const vfloat signal = splat(args.signal[t]), sigma = splat(args.sigma[t]), drift = splat(1.f - args.signal[t]);
  for_each_normal_vector(philox, first_block(n, d), d, [&](int64_t offset, vfloat noise, int count) {
    const vfloat goal = load_some(absorbing + offset, count);
    const vfloat noised = fused(sigma, noise, signal * load_some(x0 + offset, count));
    store_some(x_t + offset, gone ? goal : fused(drift, goal, noised), count);
    if (eps != nullptr) store_some(eps + offset, noise, count);
  });
}

template <typename T>
void q_sample_token(const QSampleArgs& args, Philox& philox, int64_t token) {
  const int64_t sentence = token / args.N, n = token % args.N, d = args.d;
  const int64_t t = args.times.at(token, sentence, n, args.T);
  if (!inside(t, args.T)) return note_bad(args.bad_t, token);
  const T* x0 = static_cast<const T*>(args.source) + token * d;
  if (args.ids != nullptr) {
    const int64_t id = args.ids[token];
    if (!inside(id, args.V)) return note_bad(args.bad_id, token);
    T* out = static_cast<T*>(args.x0) + token * d;
    embed_token(args, philox, sentence, n, static_cast<const T*>(args.source) + id * d, out);
    x0 = out;
  }
  T* x_t = static_cast<T*>(args.x_t) + token * d;
  T* eps = args.eps == nullptr ? nullptr : static_cast<T*>(args.eps) + token * d;
  if (clean(args.mask, token)) {
    std::memcpy(x_t, x0, sizeof(T) * d);
    if (eps != nullptr) std::memset(eps, 0, sizeof(T) * d);
    return;
  }
  set_coordinates(philox, args.key, NoiseStream::x_t, sentence);
  if (args.absorbing != nullptr) return absorb_token(args, philox, token, t, x0, x_t, eps);
  const vfloat signal = splat(args.signal[t]), sigma = splat(args.sigma[t]);
  for_each_normal_vector(philox, first_block(n, d), d, [&](int64_t offset, vfloat noise, int count) {
    store_some(x_t + offset, fused(sigma, noise, signal * load_some(x0 + offset, count)), count);
    if (eps != nullptr) store_some(eps + offset, noise, count);
  });
}

template <typename T>
void q_sample_all(const QSampleArgs& args) {
  parallel_ranges(args.B * args.N, grain(args.d), [&](int64_t begin, int64_t end) {
    Philox philox(args.key.seed);
    for (int64_t token = begin; token < end; ++token) q_sample_token<T>(args, philox, token);
  });
}

template <typename T>
void q_sample_backward_all(const QSampleBackwardArgs& args) {
  const T* grad = static_cast<const T*>(args.grad);
  T* out = static_cast<T*>(args.out);
  parallel_ranges(args.B * args.N, 4 * grain(args.d), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t t = args.times.at(token, token / args.N, token % args.N, args.T);
      const vfloat signal = splat(clean(args.mask, token) ? 1.f : args.signal[t]);
      for (int64_t j = 0; j < args.d; j += kWidth) {
        const int count = static_cast<int>(std::min<int64_t>(kWidth, args.d - j));
        store_some(out + token * args.d + j, signal * load_some(grad + token * args.d + j, count), count);
      }
    }
  });
}

// One thread owns a range of columns and walks over all tokens: no two threads meet, and every sum has one order.
template <typename T>
void embed_backward_columns(const EmbedBackwardArgs& args, int64_t begin, int64_t end) {
  const T* grad_x0 = static_cast<const T*>(args.grad_x0);
  const T* grad_x_t = static_cast<const T*>(args.grad_x_t);
  for (int64_t token = 0; token < args.B * args.N; ++token) {
    vfloat signal{};
    if (grad_x_t != nullptr)
      signal = splat(clean(args.mask, token) ? 1.f : args.signal[args.times.at(token, token / args.N, token % args.N, args.T)]);
    float* row = args.table + args.ids[token] * args.d;
    for (int64_t j = begin; j < end; j += kWidth) {
      const int count = static_cast<int>(std::min<int64_t>(kWidth, end - j));
      vfloat sum = load_some(row + j, count);
      if (grad_x0 != nullptr) sum = sum + load_some(grad_x0 + token * args.d + j, count);
      if (grad_x_t != nullptr) sum = fused(signal, load_some(grad_x_t + token * args.d + j, count), sum);
      store_some(row + j, sum, count);
    }
  }
}

template <typename T>
void embed_backward_all(const EmbedBackwardArgs& args) {
  constexpr int64_t kColumns = 16;   // a cache line of float32
  const int64_t slices = (args.d + kColumns - 1) / kColumns, tasks = std::min<int64_t>(slices, num_threads());
  parallel_for(tasks, [&](int64_t task) {
    const int64_t begin = slices * task / tasks * kColumns, end = slices * (task + 1) / tasks * kColumns;
    embed_backward_columns<T>(args, begin, std::min(end, args.d));
  });
}

template <typename T>
void sampler_step_token(const SamplerStepArgs& args, Philox& philox, int64_t token) {
  const int64_t d = args.d;
  const T* x = static_cast<const T*>(args.x) + token * d;
  const int64_t row = args.ids == nullptr ? token : args.ids[token];
  if (args.ids != nullptr && !inside(row, args.V)) return note_bad(args.bad_id, token);
  const T* x0_hat = static_cast<const T*>(args.x0_hat) + row * d;
  T* out = static_cast<T*>(args.out) + token * d;
  const vfloat a = splat(args.a[token]), b = splat(args.b[token]), c = splat(args.c[token]);
  const bool clamps = args.limit < std::numeric_limits<float>::infinity();
  const vfloat most = splat(args.limit), least = splat(-args.limit);
  const auto mean = [&](int64_t offset, int count) {
    vfloat goal = load_some(x0_hat + offset, count);
    if (clamps) goal = select(goal > most, most, select(goal < least, least, goal));   // NaN stays
    return fused(b, goal, a * load_some(x + offset, count));
  };
  if (args.c[token] == 0.f) {
    for (int64_t j = 0; j < d; j += kWidth) {
      const int count = static_cast<int>(std::min<int64_t>(kWidth, d - j));
      store_some(out + j, mean(j, count), count);
    }
    return;
  }
  set_coordinates(philox, args.key, NoiseStream::x_t, token / args.N);
  for_each_normal_vector(philox, first_block(token % args.N, d), d, [&](int64_t offset, vfloat noise, int count) {
    store_some(out + offset, fused(c, noise, mean(offset, count)), count);
  });
}

template <typename T>
void sampler_step_all(const SamplerStepArgs& args) {
  parallel_ranges(args.B * args.N, grain(args.d), [&](int64_t begin, int64_t end) {
    Philox philox(args.key.seed);
    for (int64_t token = begin; token < end; ++token) sampler_step_token<T>(args, philox, token);
  });
}

template <typename T>
void normal_all(const NormalArgs& args) {
  parallel_ranges(args.B * args.N, grain(args.d), [&](int64_t begin, int64_t end) {
    Philox philox(args.key.seed);
    for (int64_t token = begin; token < end; ++token) {
      T* out = static_cast<T*>(args.out) + token * args.d;
      set_coordinates(philox, args.key, static_cast<NoiseStream>(args.stream), token / args.N);
      for_each_normal_vector(philox, first_block(token % args.N, args.d), args.d,
                             [&](int64_t offset, vfloat noise, int count) { store_some(out + offset, noise, count); });
    }
  });
}

}  // namespace

void q_sample(const QSampleArgs& args) { args.bf16 ? q_sample_all<uint16_t>(args) : q_sample_all<float>(args); }

void q_sample_backward(const QSampleBackwardArgs& args) {
  args.bf16 ? q_sample_backward_all<uint16_t>(args) : q_sample_backward_all<float>(args);
}

void embed_backward(const EmbedBackwardArgs& args) {
  args.bf16 ? embed_backward_all<uint16_t>(args) : embed_backward_all<float>(args);
}

void sampler_step(const SamplerStepArgs& args) {
  args.bf16 ? sampler_step_all<uint16_t>(args) : sampler_step_all<float>(args);
}

void philox_normal(const NormalArgs& args) { args.bf16 ? normal_all<uint16_t>(args) : normal_all<float>(args); }

void philox_words(const PhiloxWordsArgs& args) {
  Philox philox(args.seed);
  philox.counter1 = args.counter[1];
  philox.counter2 = args.counter[2];
  philox.counter3 = args.counter[3];
  for (int64_t block = 0; block < args.count; block += kBlocks) {
    vint words[4];
    philox_blocks(philox, args.counter[0] + static_cast<uint32_t>(block), words);
    for (int64_t i = block; i < std::min<int64_t>(args.count, block + kBlocks); ++i) {
      for (int word = 0; word < 4; ++word) args.out[4 * i + word] = static_cast<uint32_t>(words[word][i - block]);
    }
  }
}

}  // namespace PDS_ISA
}  // namespace pds
