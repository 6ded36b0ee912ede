// Sums over rows: each block adds up its chunk of them into a partial sum of its own, a second launch adds these up.
// (Had the last block to finish done it, one multiprocessor would read all; and its ticket needs a zero first.)
#pragma once

#include "cuda/launch.cuh"

namespace m3ae::cuda {

constexpr int kSumWarps = 16;

// out[i] = the sum of partials[0..number)[i], in an order that depends on `number` alone.
static __global__ void __launch_bounds__(kSumWarps* kWarp)
    sum_partials_kernel(const float* partials, float* out, int64_t number, int64_t size) {
  __shared__ float sums[kSumWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t i = int64_t{blockIdx.x} * kWarp + lane;
  float sum = 0;
  if (i < size) {
#pragma unroll 8
    for (int64_t p = warp; p < number; p += kSumWarps) sum += partials[p * size + i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= size) return;
#pragma unroll
  for (int w = 1; w < kSumWarps; ++w) sum += sums[w][lane];
  out[i] = sum;
}

inline void sum_partials(const float* partials, float* out, int64_t number, int64_t size, const Stream& stream) {
  M3AE_LAUNCH(sum_partials_kernel, grid((size + kWarp - 1) / kWarp), kSumWarps * kWarp, 0, stream, partials, out,
              number, size);
}

}  // namespace m3ae::cuda
