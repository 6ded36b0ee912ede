// m3ae_fast._cuda: CUDA kernels, torch-free, static runtime. For now it answers what it was built for and what it sees.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

__global__ void fill_kernel(float* out, float value, long long count) {
  const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (i < count) out[i] = value;
}

// A launch on the caller's stream: proves that this build's machine code runs on this device.
void fill(std::uintptr_t out, float value, long long count, std::uintptr_t stream) {
  if (count <= 0) return;
  const unsigned blocks = static_cast<unsigned>((count + 255) / 256);
  fill_kernel<<<blocks, 256, 0, reinterpret_cast<cudaStream_t>(stream)>>>(reinterpret_cast<float*>(out), value, count);
  check(cudaGetLastError(), "fill_kernel");
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) return 0;
  check(error, "cudaGetDeviceCount");
  return count;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "m3ae_fast CUDA kernels";
  module.attr("runtime_version") = CUDART_VERSION;
  module.def("device_count", &device_count, "CUDA devices that this build's runtime sees");
  module.def("fill", &fill, "write value to count floats at an address, on a stream");
}
