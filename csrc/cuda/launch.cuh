// Kernels and their launches: the one place that knows whether this is CUDA or its emulator.
#pragma once

#ifdef M3AE_EMULATED
#include <cmath>
#include <utility>

#include "cuda/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

#include "check.h"
#include "dtype.h"
#include "tensor.h"

namespace m3ae::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kWarp = 32;
constexpr int kStaticShared = 1 << 10;  // bytes, at most, of a kernel with some 48 KB of dynamic shared memory or more

using Address = std::uintptr_t;  // what passes through Python as a number: of arrival counters, of a stream

// Where a call's kernels run.
struct Stream {
  int device;
  Address handle;  // of torch's current stream there
};

template <class T>
struct Plain {
  using type = T;
};

// A tensor's device, and torch's current stream there.
inline Stream stream_of(const Tensor& x) {
#ifdef M3AE_EMULATED
  (void)x;
  return {0, 0};
#else
  void* handle = nullptr;
  if (exchange_api->current_work_stream(dlpack::kCuda, x.device().index, &handle) != 0)
    throw std::runtime_error("torch has no current stream of a CUDA device");
  return {x.device().index, reinterpret_cast<Address>(handle)};
#endif
}

// x, of which the compiler knows nothing more: what depends on it is computed here, in each turn of a loop anew, and
// does not wait in registers that are short.
__device__ __forceinline__ int here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

#ifdef M3AE_EMULATED

class OnDevice {
 public:
  explicit OnDevice(int) {}
};

template <class T>
__device__ T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::shared.data());
}

// As many blocks as a GPU holds at a time; here so few that each has much to do.
template <class... Args>
int64_t blocks_at_a_time(const char*, void (*)(Args...), int, size_t, const Stream&) {
  return 3;
}

template <class... Args>
void launch(const char* name, void (*kernel)(Args...), dim3 grid, int threads, size_t shared, const Stream&,
            typename Plain<Args>::type... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  try {
    if (threads > 1024 || threads % kWarp != 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535 ||
        shared > size_t{(227 << 10) - kStaticShared})
      throw std::logic_error("a GPU would refuse this launch");
    emulator::run(grid, dim3(static_cast<unsigned>(threads)), shared, [&] { kernel(args...); });
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(name) + ": " + error.what());
  }
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// A block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char m3ae_dynamic_shared[];
  return reinterpret_cast<T*>(m3ae_dynamic_shared);
}

// The device of a call is the thread's own until the call returns: torch's choice is left as it was.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    moved_ = before_ != device;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

// Lets a kernel have so much dynamic shared memory.
inline void allow_shared(const char* name, const void* function, size_t shared, const Stream& stream) {
  constexpr size_t kWithoutAsking = (48 << 10) - kStaticShared;
  if (shared <= kWithoutAsking) return;
  int most = 0;  // all there is beside the static: less would take it from another thread's launch of the same kernel
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device), name);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most - kStaticShared), name);
}

// As many blocks of a kernel as the GPU holds at a time.
template <class... Args>
int64_t blocks_at_a_time(const char* name, void (*kernel)(Args...), int threads, size_t shared, const Stream& stream) {
  const OnDevice on(stream.device);
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared(name, function, shared, stream);
  int processors = 0, each = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, stream.device), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function, threads, shared), name);
  return int64_t{processors} * each;
}

// One launch; RuntimeError that names the kernel if CUDA refuses it. An empty grid launches nothing.
template <class... Args>
void launch(const char* name, void (*kernel)(Args...), dim3 grid, int threads, size_t shared, const Stream& stream,
            typename Plain<Args>::type... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const OnDevice on(stream.device);
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared(name, function, shared, stream);
  void* pointers[] = {&args...};
  check(cudaLaunchKernel(function, grid, dim3(static_cast<unsigned>(threads)), pointers, shared,
                         reinterpret_cast<cudaStream_t>(stream.handle)),
        name);
}

#endif

// Rows, samples or (row, head) pairs as a grid's x, one block or more each.
inline dim3 grid(int64_t blocks) {
  M3AE_CHECK(blocks >= 0 && blocks < (int64_t{1} << 31), "a grid must have fewer than 2^31 blocks, got ", blocks);
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace m3ae::cuda

// The name that an error has is the kernel's own.
#define M3AE_LAUNCH(kernel, ...) ::m3ae::cuda::launch(#kernel, kernel, __VA_ARGS__)
