// Arguments of the MBR kernel: the utility of every pair of candidates of one sentence.
#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace pds {

// Formulas and their names: pydiffseq/metrics/sentence.py, which is also the reference.
enum class Utility { bleu, chrf, f1, edit };
enum class BleuSmoothing { add1, add1_all, method4, exp };

// tokens holds `count` candidates one after the other; candidate c is [offsets[c], offsets[c + 1]). Tokens are numbered
// 0 .. distinct - 1. utility is [count, count]: row i, column j takes i as the hypothesis and j as the reference.
struct MbrArgs {
  const int64_t* tokens;
  const int64_t* offsets;
  int64_t count, distinct;
  Utility metric;
  BleuSmoothing smoothing;   // of bleu
  double* utility;
};

PDS_DISPATCH(mbr_utilities, MbrArgs)

}  // namespace pds
