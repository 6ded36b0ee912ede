#pragma once

#include "cpu/dispatch.h"
#include "ops/gather_patches/patches.h"

namespace m3ae {

struct MaskedMse {
  PatchSource source;
  const int32_t* ids;  // [M] within the image
  const int32_t* cu;   // [images + 1]
  const void* pred;    // [M, patch * patch * channels]
  int64_t images;
  Dtype pred_dtype;
  bool norm_pix;
};

// dpred = d(weighted sum of row losses): row t of image n has the factor weight[n] * dloss[t * dloss_stride].
struct MaskedMseBackward {
  MaskedMse forward;
  const double* weight;  // [images]
  const void* dloss;     // fp32, or fp64 for fp64
  void* dpred;           // as pred; rows from cu[images] on become zero
  int64_t dloss_stride;  // 0: one for all rows
};

constexpr int64_t kTargetPadding = 16;  // scratch: one target row in the accumulation type and so many values more

}  // namespace m3ae

// Rows [begin, end), all of them before cu[images]: row_loss[t] = the mean squared error of row t.
M3AE_KERNEL(void masked_mse(const MaskedMse& args, void* target, double* row_loss, int64_t begin, int64_t end))
M3AE_KERNEL(void masked_mse_backward(const MaskedMseBackward& args, void* target, int64_t begin, int64_t end))
