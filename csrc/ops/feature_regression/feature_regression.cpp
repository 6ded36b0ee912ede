#include "ops/feature_regression/feature_regression.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/pages.h"
#include "cpu/threads.h"
#include "reduction.h"

namespace py = pybind11;

namespace m3ae {
namespace {

// What the loss of each row is multiplied with before all are added up; 0 for rows past cu's last entry.
std::vector<double> row_weights(Reduction reduction, const int32_t* cu, int64_t samples, int64_t count) {
  std::vector<double> weights(static_cast<size_t>(count), 0.0);
  if (reduction == Reduction::sample_mean) {
    for (int64_t n = 0; n < samples; ++n)
      std::fill(weights.begin() + cu[n], weights.begin() + cu[n + 1], 1.0 / samples / (cu[n + 1] - cu[n]));
  } else {
    const int64_t named = cu ? cu[samples] : count;
    std::fill_n(weights.begin(), named, reduction == Reduction::mean ? 1.0 / named : 1.0);
  }
  return weights;
}

// loss: one, or with reduction "none" one a row.
void forward(const Tensor& pred, const Tensor& target, const Tensor& rows, const Tensor& cu_seqlens,
             const std::string& distance, bool normalize, double eps,
             const std::string& reduction_name, const Tensor& loss, const Tensor& dpred) {
  const Reduction reduction = reduction_of(reduction_name);
  const int64_t count = pred.size(0), width = pred.size(1);
  const int64_t samples = cu_seqlens ? sequences_of("cu_seqlens", cu_seqlens) : 0;
  M3AE_CHECK(width > 0, "pred must have at least one column, got none");
  const int32_t* cu = cu_seqlens.optional_int32s("cu_seqlens", {samples + 1});
  if (cu) check_offsets("cu_seqlens", cu, samples, count);
  const int32_t* predicted = rows.optional_int32s("rows", {count});
  for (int64_t r = 0, named = cu ? cu[samples] : count; predicted && r < named; ++r)
    M3AE_CHECK(predicted[r] >= 0 && predicted[r] < target.size(0), "rows must be in [0, ", target.size(0),
               "), the rows of target, got ", predicted[r], " at row ", r);
  const std::vector<double> weights = row_weights(reduction, cu, samples, count);
  std::vector<double> row_loss(static_cast<size_t>(count));
  const FeatureRegression args{pred.dense("pred", {count, width}), target.dense("target", {rows ? kAny : count, width}),
                               predicted, weights.data(), row_loss.data(),
                               dpred.optional("dpred", {count, width}, pred.dtype()), width, eps, pred.dtype(),
                               target.dtype(),
                               distance == "l2"   ? Distance::l2 : distance == "l1" ? Distance::l1 : Distance::cosine,
                               normalize};
  if (args.dpred) prefer_huge_pages(args.dpred, count * width * size_of(args.pred_dtype));
  const Reduced out("loss", loss, reduction, count, accumulator(pred.dtype()));
  const auto kernel = M3AE_DISPATCH(feature_regression);
  parallel_for(count, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (reduction == Reduction::none) {
    for (int64_t r = 0; r < count; ++r) out.write(r, row_loss[r]);
    return;
  }
  out.write(0, sum_in_chains(count, [&](int64_t r) { return weights[r] * row_loss[r]; }));
}

}  // namespace

void bind_feature_regression(py::module_& module) {
  bind(module, "feature_regression", forward, {"pred", "target", "rows", "cu_seqlens", "distance", "normalize", "eps",
       "reduction", "loss", "dpred"});
}

}  // namespace m3ae
