// Marks functions that kernels on the CPU and on a GPU share. Internal linkage and always inlined: each instruction set
// compiles its own copy.
#pragma once

#ifdef __CUDACC__
#define M3AE_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define M3AE_HOST_DEVICE static inline __attribute__((always_inline))
#endif
