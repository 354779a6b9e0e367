// Launchers of the fused cross-entropy of a linear layer on CUDA; see common/cross_entropy.h for what it computes.
#pragma once
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/row_tiles.h"

namespace pds {
namespace cuda {

constexpr int64_t kCrossEntropyMostFeatures = 128;   // the products' sums of the backward pass stay in registers
constexpr int kGradientTile = 64;                    // rows that the backward kernels walk over at a time

// Of some logits of a row: sum = sum of exp(logit - highest), total = sum of logits.
struct LogSum {
  float highest, sum, total;
};

// What the gradient of a row's logits needs: scale (softmax - uniform - [target] keep).
struct alignas(16) SampleRow {
  float lse, scale;
  int32_t target;
};

struct CrossEntropyCudaArgs {
  // [rows, stride] and [vocab, stride] of Launch's type, 16-bit, at multiples of 16 bytes: stride is dim, rounded up to a
  // multiple of 8 with zeros. In the backward pass rows that are left out are zeros.
  const void *x, *table;
  const float* bias;              // [vocab rounded up to a multiple of kTileRows]; -inf behind vocab
  const int64_t* target;          // [rows]
  int64_t rows, vocab, dim, stride, ignore_index;
  float uniform, keep;            // weights of a label: uniform for every word, and keep for the target
  float *losses, *lse;            // [rows]; lse is read by the backward pass
  int64_t parts;                  // tile_parts(rows, tiles of the table)
  LogSum* sums;                   // forward, workspace: [rows, parts, 2]
  float* at_target;               // forward, workspace: [rows]

  const float* grad;              // backward: [rows], of the losses
  int64_t parts_x, parts_table;   // tile_parts(rows, tiles of the table), tile_parts(vocab, tiles of x), of kGradientTile
  SampleRow* samples;             // workspace: [rows rounded up to a multiple of kTileRows]
  float* largest;                 // workspace: [1] the largest |grad|, in units of which the logits' gradients are
  float* partial;                 // workspace: [parts, rows or vocab, dim] of whichever has more than one part
  float* partial_bias;            // workspace: [parts_table, vocab], or null without grad_bias
  void *grad_x, *grad_table;      // [rows, dim], [vocab, dim]
  void* grad_bias;                // [vocab] or null
};

Status cross_entropy_forward(const CrossEntropyCudaArgs& args, const Launch& launch);
Status cross_entropy_backward(const CrossEntropyCudaArgs& args, const Launch& launch);

}  // namespace cuda
}  // namespace pds
