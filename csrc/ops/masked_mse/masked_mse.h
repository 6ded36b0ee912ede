#pragma once

#include <string>

#include "check.h"
#include "cpu/dispatch.h"
#include "ops/gather_patches/patches.h"

namespace m3ae {

struct MaskedMse {
  PatchSource source;
  const int32_t* ids;  // [M] within the image
  const int32_t* cu;   // [images + 1]
  const void* pred;    // [M, patch * patch * channels]
  void* error;         // as pred, pred - target: zero in rows from cu[images] on; null: not wanted
  double* row_loss;    // [M] the mean of error^2
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

enum class Reduction : int { none, sum, mean, sample_mean };

inline Reduction reduction_of(const std::string& name) {
  if (name == "none") return Reduction::none;
  if (name == "sum") return Reduction::sum;
  if (name == "mean") return Reduction::mean;
  M3AE_CHECK(name == "sample_mean", "reduction must be none, sum, mean or sample_mean, got ", name);
  return Reduction::sample_mean;
}

// What the loss of a row of this image is multiplied with before all are added up.
M3AE_HOST_DEVICE double row_weight(Reduction reduction, const int32_t* cu, int64_t images, int64_t image) {
  const auto at_least_one = [](int32_t rows) { return static_cast<double>(rows > 0 ? rows : 1); };
  if (reduction == Reduction::mean) return 1 / at_least_one(cu[images]);
  if (reduction == Reduction::sample_mean)
    return 1 / static_cast<double>(images) / at_least_one(cu[image + 1] - cu[image]);
  return 1;
}

constexpr int64_t kTargetPadding = 16;  // scratch: one target row in the accumulation type and so many values more

}  // namespace m3ae

// Rows [begin, end).
M3AE_KERNEL(void masked_mse(const MaskedMse& args, void* target, int64_t begin, int64_t end))
M3AE_KERNEL(void masked_mse_backward(const MaskedMseBackward& args, int64_t begin, int64_t end))
