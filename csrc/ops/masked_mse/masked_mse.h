#pragma once

#include "cpu/dispatch.h"
#include "ops/gather_patches/patches.h"

namespace m3ae {

struct MaskedMse {
  PatchSource source;
  const int32_t* ids_mask;  // [M] within the image
  const int32_t* cu_mask;   // [images + 1]
  const void* pred;         // [M, patch * patch * channels]
  void* error;              // as pred, pred - target: zero in rows from cu_mask[images] on; null: not wanted
  double* row_loss;         // [M] the mean of error^2
  int64_t images;
  Dtype pred_dtype;
  bool norm_pix;
};

// dpred = error * row_factor
struct MaskedMseBackward {
  const void* error;         // [M, width]
  const double* row_factor;  // [M]
  void* dpred;               // as error; zero in rows from `named` on
  int64_t named, width;
  Dtype dtype;
};

constexpr int64_t kTargetPadding = 16;  // scratch: one target row in the accumulation type and so many values more

}  // namespace m3ae

// Rows [begin, end).
M3AE_KERNEL(void masked_mse(const MaskedMse& args, void* target, int64_t begin, int64_t end))
M3AE_KERNEL(void masked_mse_backward(const MaskedMseBackward& args, int64_t begin, int64_t end))
