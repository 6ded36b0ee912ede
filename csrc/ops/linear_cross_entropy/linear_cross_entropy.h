#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

// Cross entropy of a block of logits, which become their gradient in place. The products around it are oneDNN's: see
// m3ae_fast/ops/linear_cross_entropy/cpp_backend.py.
struct CrossEntropyBlock {
  void* logits;           // [rows, vocab]; out: dloss (softmax - target), where dloss is given
  const int32_t* rows;    // [rows], which row of target, dloss, loss and hit this is
  const int32_t* target;  // [T], every one named by rows in [0, vocab)
  const void* dloss;      // accumulators [T] (fp32; fp64 for Dtype::f64); null: no gradient
  void* loss;             // accumulators [T]
  void* hit;              // accumulators [T], 1 where no logit before the target's is as large and none is larger
  int64_t vocab;
  double label_smoothing;
  Dtype dtype;
};

}  // namespace m3ae

M3AE_KERNEL(void cross_entropy_block(const CrossEntropyBlock& args, int64_t begin, int64_t end))
