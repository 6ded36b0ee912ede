// Sums over a warp and a block, in an order that depends on the number of threads alone.
#pragma once

#include "cuda/launch.cuh"

namespace m3ae::cuda {

// Over `lanes` neighboring lanes (a power of two); every lane gets it.
template <int lanes = kWarp, class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int with = lanes / 2; with > 0; with /= 2) value += __shfl_xor_sync(kAllLanes, value, with);
  return value;
}

template <int lanes = kWarp>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int with = lanes / 2; with > 0; with /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, with));
  return value;
}

// The sum of the values of the lanes up to this one.
__device__ __forceinline__ int warp_scan(int value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, by);
    if (lane >= by) value += before;
  }
  return value;
}

// Over a block of whole warps; every thread gets it. scratch: one T a warp, in shared memory.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_sum(value);
  __syncthreads();  // scratch may still be read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = scratch[0];
  for (int i = 1; i < warps; ++i) sum += scratch[i];
  return sum;
}

}  // namespace m3ae::cuda
