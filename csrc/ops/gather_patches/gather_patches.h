#pragma once

#include "cpu/dispatch.h"
#include "ops/gather_patches/patches.h"

namespace m3ae {

struct GatherPatches {
  PatchSource source;
  const int32_t* ids;  // [T] within the image
  const int32_t* cu;   // [images + 1]
  void* out;           // [T, patch * patch * channels]; rows from cu[images] on become zero
  int64_t images;
  Dtype out_dtype;
};

struct GatherPatchesBackward {
  const void* dout;     // [T, patch * patch * channels]
  const int32_t* ids;
  const int32_t* cu;
  void* dimages;        // accumulators [N, channels, rows * patch, columns * patch], zeroed
  const double* scale;  // [channels]
  int64_t channels, patch, rows, columns;
  Dtype dout_dtype, accumulator;
};

}  // namespace m3ae

M3AE_KERNEL(void gather_patches(const GatherPatches& args, int64_t begin, int64_t end))                    // rows
M3AE_KERNEL(void gather_patches_backward(const GatherPatchesBackward& args, int64_t begin, int64_t end))  // images
