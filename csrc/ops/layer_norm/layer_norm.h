#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

// s = x + residual, y = (s - mean) / sqrt(var + eps) * weight + bias, see m3ae_fast/ops/layer_norm/reference.py.
// s is of the wider of x's and residual's dtypes; accumulators are fp32, fp64 where s is.
struct LayerNorm {
  const void* x;         // [T, width]
  const void* residual;  // [T, width]; null: s is x
  const void* weight;    // [width] accumulators; null: ones
  const void* bias;      // [width] accumulators; null: zeros
  void* y;               // [T, width]
  void* s;               // [T, width]; null without residual
  void* stats;           // accumulators [2][T]: mean, 1 / sqrt(var + eps)
  int64_t count, width;  // T, D
  double eps;
  Dtype x_dtype, residual_dtype, y_dtype;
};

struct LayerNormBackward {
  const void* dy;      // [T, width]
  const void* ds;      // [T, width] of s's dtype, the gradient that reaches s from elsewhere; null: none
  const void* s;       // [T, width]
  const void* weight;  // as above
  const void* stats;   // as above
  void* dx;            // [T, width] of s's dtype; null: not wanted
  int64_t count, width;
  Dtype s_dtype, y_dtype;
};

}  // namespace m3ae

M3AE_KERNEL(void layer_norm(const LayerNorm& args, int64_t begin, int64_t end))
// partial: [2][width] accumulators that dweight and dbias are added to; null: not wanted.
M3AE_KERNEL(void layer_norm_backward(const LayerNormBackward& args, int64_t begin, int64_t end, void* partial))
