#include "ops/feature_regression/feature_regression.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/pages.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

void check_offsets(const int32_t* cu, int64_t samples, int64_t count) {
  bool ascends = cu[0] == 0 && cu[samples] <= count;
  for (int64_t n = 0; n < samples; ++n) ascends = ascends && cu[n] <= cu[n + 1];
  M3AE_CHECK(ascends, "cu_seqlens must ascend from 0 to at most ", count, " rows, got ", cu[0], " to ", cu[samples]);
}

// What the loss of each row is multiplied with before all are added up; 0 for rows past cu's last entry.
std::vector<double> row_weights(const std::string& reduction, const int32_t* cu, int64_t samples, int64_t count) {
  std::vector<double> weights(static_cast<size_t>(count), 0.0);
  if (reduction == "sample_mean") {
    for (int64_t n = 0; n < samples; ++n)
      std::fill(weights.begin() + cu[n], weights.begin() + cu[n + 1], 1.0 / samples / (cu[n + 1] - cu[n]));
  } else {
    const int64_t named = cu ? cu[samples] : count;
    std::fill_n(weights.begin(), named, reduction == "mean" ? 1.0 / named : 1.0);
  }
  return weights;
}

// cu: [samples + 1], null: all rows count. loss: one, or with reduction "none" one a row; fp64 where pred is, else fp32.
void forward(Address pred, int pred_dtype, Address target, int target_dtype, int64_t count, int64_t width,
             int64_t target_rows, Address rows, Address cu, int64_t samples, const std::string& distance,
             bool normalize, double eps, const std::string& reduction, Address loss, Address dpred) {
  if (cu) check_offsets(int32s(cu), samples, count);
  const int64_t named = cu ? int32s(cu)[samples] : count;
  for (int64_t r = 0; rows && r < named; ++r)
    M3AE_CHECK(int32s(rows)[r] >= 0 && int32s(rows)[r] < target_rows, "rows must be in [0, ", target_rows,
               "), the rows of target, got ", int32s(rows)[r], " at row ", r);
  const std::vector<double> weights = row_weights(reduction, int32s(cu), samples, count);
  std::vector<double> row_loss(static_cast<size_t>(count));
  const FeatureRegression args{pointer(pred), pointer(target), int32s(rows), weights.data(), row_loss.data(),
                               pointer(dpred), width, eps, Dtype(pred_dtype), Dtype(target_dtype),
                               distance == "l2"   ? Distance::l2
                               : distance == "l1" ? Distance::l1
                                                  : Distance::cosine,
                               normalize};
  if (dpred) prefer_huge_pages(pointer(dpred), count * width * size_of(args.pred_dtype));
  const auto kernel = M3AE_DISPATCH(feature_regression);
  parallel_for(count, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  const auto write = [&](int64_t at, double value) {
    if (args.pred_dtype == Dtype::f64)
      as<double>(pointer(loss))[at] = value;
    else
      as<float>(pointer(loss))[at] = static_cast<float>(value);
  };
  if (reduction == "none") {
    for (int64_t r = 0; r < count; ++r) write(r, row_loss[r]);
    return;
  }
  double sums[16] = {};  // short chains: one long one would round more often
  for (int64_t r = 0; r < count; ++r) sums[r % 16] += weights[r] * row_loss[r];
  for (int half = 8; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  write(0, sums[0]);
}

}  // namespace

void bind_feature_regression(py::module_& module) {
  module.def("feature_regression", &forward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace m3ae
