#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

enum class Distance : int { l2, l1, cosine };

struct FeatureRegression {
  const void* pred;      // [R, width]
  const void* target;    // [T, width]; fp64 where pred is and nowhere else
  const int32_t* rows;   // [R] the row of target that each row of pred predicts; null: row by row
  const double* weight;  // [R] what a row's loss is multiplied with in dpred; 0: the row counts nowhere
  double* row_loss;      // [R] without its weight
  void* dpred;           // as pred, the gradient of sum(weight * row_loss); null: not wanted
  int64_t width;
  double eps;
  Dtype pred_dtype, target_dtype;
  Distance distance;
  bool normalize;
};

}  // namespace m3ae

// Rows [begin, end).
M3AE_KERNEL(void feature_regression(const FeatureRegression& args, int64_t begin, int64_t end))
