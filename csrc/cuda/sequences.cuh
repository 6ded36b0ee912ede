// Which sequence of a packed batch a row belongs to.
#pragma once

#include "cuda/launch.cuh"

namespace m3ae::cuda {

// As many sequences as end at or before `row`: the one that it belongs to, `count` for rows past the last. By a whole
// warp, which looks at 32 ends at a time.
__device__ __forceinline__ int sequence_of(const int32_t* cu, int64_t count, int64_t row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int low = 0, high = static_cast<int>(count);
  while (low < high) {
    const int step = (high - low + kWarp - 1) / kWarp, at = low + lane * step;
    const int ended = __popc(__ballot_sync(kAllLanes, at < high && cu[at + 1] <= row));
    if (ended * step < high - low) high = low + ended * step;
    if (ended > 0) low += (ended - 1) * step + 1;
  }
  return low;
}

}  // namespace m3ae::cuda
