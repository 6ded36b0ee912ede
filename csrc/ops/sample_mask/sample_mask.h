#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

// Of each sample's positions, the ones with the smallest (random word, position) are kept: see
// m3ae_fast/ops/sample_mask/reference.py for the words.
struct SampleMask {
  const int32_t* cu;           // [B + 1] offsets of the samples' positions
  const int32_t* cu_keep;      // [B + 1] offsets of their kept positions
  const int64_t* sample_ids;   // [B]
  int32_t* ids_keep;           // [cu_keep[B]]
  int32_t* ids_mask;           // [cu[B] - cu_keep[B]]
  uint64_t seed;
  uint32_t step, stream;
};

constexpr int64_t kSampleMaskBlock = 64;  // words are drawn in blocks of so many: scratch must have room for the last

}  // namespace m3ae

// Samples [begin, end); words: scratch for the longest of them, rounded up to whole blocks.
M3AE_KERNEL(void sample_mask(const SampleMask& args, uint32_t* words, int64_t begin, int64_t end))
