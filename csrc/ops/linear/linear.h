#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2 };  // the codes of m3ae_fast/ops/linear/cpp_backend.py

// y = act(z), elementwise. The product itself is oneDNN's: see m3ae_fast/ops/linear/cpp_backend.py.
struct LinearActivation {
  const void* z;
  void* y;  // may be z
  Activation activation;
  Dtype dtype;
};

// dz = act'(z) dy, and its sum over rows.
struct LinearActivationBackward {
  const void* dy;  // [M, width]
  const void* z;   // [M, width]; unused without an activation
  void* dz;        // [M, width]; null: not wanted
  int64_t width;
  Activation activation;
  Dtype dtype;
};

}  // namespace m3ae

M3AE_KERNEL(void linear_activation(const LinearActivation& args, int64_t begin, int64_t end))
M3AE_KERNEL(void linear_activation_backward(const LinearActivationBackward& args, void* sum, int64_t begin, int64_t end))
