// m3ae_fast._cuda: the CUDA kernels. Tensors come as addresses, sizes and dtype codes, with the device and torch's
// current stream there; torch is never linked, the CUDA runtime is static. Built by a C++ compiler with M3AE_EMULATED,
// it is _cuda_emulated: the same kernels on CPU tensors, to be tested (cuda/emulator.h).
#include "cuda/bind.h"
#include "cuda/launch.cuh"

#ifndef __CUDA_ARCH__  // nothing here is for the device

namespace m3ae::cuda {
namespace {

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
#define M3AE_OP(op) m3ae::cuda::bind_##op(module);
#include "cuda/ops.inc"
#undef M3AE_OP
}
#endif
