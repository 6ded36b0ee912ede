// m3ae_fast._cuda: the CUDA kernels. Tensors are read through DLPack (tensor.h), and so is torch's current stream; torch
// is never linked, the CUDA runtime is static. Built by a C++ compiler with M3AE_EMULATED,
// it is _cuda_emulated: the same kernels on CPU tensors, to be tested (cuda/emulator.h).
#include <map>
#include <utility>

#include "cuda/bind.h"
#include "cuda/partials.cuh"

namespace m3ae::cuda {
namespace {

// What blocks count their arrivals with (partials.cuh): rows of counters, each for a stream or graph. The module's own
// memory: torch's might lie in the pool of a graph that is being made, and be given away again with it.
constexpr int kCounterRows = 256, kCounters = 256;
[[maybe_unused]] __device__ unsigned counter_rows[kCounterRows][kCounters];  // the host alone names it

}  // namespace
}  // namespace m3ae::cuda

#ifndef __CUDA_ARCH__  // nothing else here is for the device

namespace m3ae::cuda {
namespace {

#ifdef M3AE_EMULATED
unsigned long long graph_of(const Stream&) { return 0; }
Address first_counter_row(int) { return reinterpret_cast<Address>(counter_rows); }
#else
// The graph that a stream is being captured into, 0: none. Its number is no other's as long as the process lives.
unsigned long long graph_of(const Stream& stream) {
  cudaStreamCaptureStatus status;
  unsigned long long graph = 0;
  check(cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream.handle), &status, &graph),
        "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? graph : 0;
}

Address first_counter_row(int device) {
  static std::map<int, Address> known;
  Address& row = known[device];
  if (!row) {
    void* address = nullptr;
    check(cudaGetSymbolAddress(&address, counter_rows), "cudaGetSymbolAddress");
    row = reinterpret_cast<Address>(address);
  }
  return row;
}
#endif

// `count` counters, which are zero while no kernel of this stream runs: its launches follow one another, as those of
// what a graph captured of it do, and each leaves zeros. 0: no row is left, or none so long. With Python's lock held.
Address counters(int device, Address on, int64_t count) {
  static std::map<int, std::map<std::pair<Address, unsigned long long>, int>> given;
  constexpr Address kPerThread = 2;  // cudaStreamPerThread: another stream for each thread
  if (count > kCounters || on == kPerThread) return 0;
  const OnDevice on_device(device);
  auto& rows = given[device];
  const int row = rows.try_emplace({on, graph_of({device, on})}, static_cast<int>(rows.size())).first->second;
  return row < kCounterRows ? first_counter_row(device) + row * sizeof(counter_rows[0]) : 0;
}

#ifndef M3AE_EMULATED
int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) return 0;
  check(error, "cudaGetDeviceCount");
  return count;
}
#endif

}  // namespace

#define M3AE_OP(op) void bind_##op(pybind11::module_& module);
#include "cuda/ops.inc"
#undef M3AE_OP

}  // namespace m3ae::cuda

#ifdef M3AE_EMULATED
PYBIND11_MODULE(_cuda_emulated, module) {
  module.doc() = "m3ae_fast CUDA kernels in the emulator";
  module.def("reverse", &m3ae::emulator::reverse, "run threads and blocks in descending order, or ascending again");
#else
PYBIND11_MODULE(_cuda, module) {
  module.doc() = "m3ae_fast CUDA kernels";
  module.attr("runtime_version") = CUDART_VERSION;
  module.def("device_count", &m3ae::cuda::device_count, "CUDA devices that this build's runtime sees");
#endif
  m3ae::load_exchange_api();
  module.def("counters", &m3ae::cuda::counters);
  module.def("sum_counters", [](int64_t number) { return m3ae::cuda::sum_counters(number); });
#define M3AE_OP(op) m3ae::cuda::bind_##op(module);
#include "cuda/ops.inc"
#undef M3AE_OP
}
#endif
