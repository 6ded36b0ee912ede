#pragma once

#include "host_device.h"
#include "reduction.h"

namespace m3ae {

// What the loss of a row of this image is multiplied with before all are added up.
M3AE_HOST_DEVICE double row_weight(Reduction reduction, const int32_t* cu, int64_t images, int64_t image) {
  const auto at_least_one = [](int32_t rows) { return static_cast<double>(rows > 0 ? rows : 1); };
  if (reduction == Reduction::mean) return 1 / at_least_one(cu[images]);
  if (reduction == Reduction::sample_mean)
    return 1 / static_cast<double>(images) / at_least_one(cu[image + 1] - cu[image]);
  return 1;
}

}  // namespace m3ae
