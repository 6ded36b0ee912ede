// What the bindings of the CPU and of CUDA take: tensors become a kernel's arguments, and are checked on the way.
#pragma once

#include "ops/layer_norm/layer_norm.h"
#include "tensor.h"

namespace m3ae {

inline LayerNorm layer_norm_arguments(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                                      double eps, const Tensor& y, const Tensor& s, const Tensor& stats) {
  const int64_t count = x.size(0), width = x.size(1);
  const Dtype accumulate = accumulator(residual ? s.dtype() : x.dtype());
  return {x.dense("x", {count, width}), residual.optional("residual", {count, width}),
          weight.optional("weight", {width}, accumulate), bias.optional("bias", {width}, accumulate),
          y.dense("y", {count, width}), residual ? s.dense("s", {count, width}) : nullptr,
          stats.dense("stats", {2, count}, accumulate), count, width, eps, x.dtype(),
          residual ? residual.dtype() : x.dtype(), y.dtype()};
}

inline LayerNormBackward layer_norm_arguments(const Tensor& dy, const Tensor& ds, const Tensor& s, const Tensor& weight,
                                              const Tensor& stats, const Tensor& dx) {
  const int64_t count = s.size(0), width = s.size(1);
  const Dtype accumulate = accumulator(s.dtype());
  return {dy.dense("dy", {count, width}), ds.optional("ds", {count, width}, s.dtype()), s.dense("s", {count, width}),
          weight.optional("weight", {width}, accumulate), stats.dense("stats", {2, count}, accumulate),
          dx.optional("dx", {count, width}, s.dtype()), count, width, s.dtype(), dy.dtype()};
}

}  // namespace m3ae
