#include "ops/masked_mse/masked_mse.h"

#include <pybind11/stl.h>

#include <string>

#include "cpu/threads.h"
#include "ops/gather_patches/arguments.h"
#include "ops/masked_mse/row_weight.h"

namespace py = pybind11;

namespace m3ae {
namespace {

// loss: one, or with reduction "none" one a row.
void forward(const Tensor& pred, const Tensor& images, const Tensor& ids_mask, const Tensor& cu_mask,
             int64_t patch_size, bool norm_pix, const std::vector<double>& scale, const std::vector<double>& shift,
             const std::string& reduction_name, const Tensor& loss, const Tensor& error) {
  const Reduction reduction = reduction_of(reduction_name);
  const int64_t rows = pred.size(0), samples = images.size(0);
  const bool wide = images.dtype() == Dtype::f64 || pred.dtype() == Dtype::f64;
  const Patches patches(images, patch_size, scale, shift, wide ? Dtype::f64 : Dtype::f32);
  const PatchSource& source = patches.source();
  M3AE_CHECK(!norm_pix || patches.values() > 1, "norm_pix must be False for patches of one value, which have no ",
             "variance");
  std::vector<double> row_loss(static_cast<size_t>(rows));
  const MaskedMse args{source, ids_mask.int32s("ids_mask", {rows}), cu_mask.int32s("cu_mask", {samples + 1}),
                       pred.dense("pred", {rows, patches.values()}),
                       error.optional("error", {rows, patches.values()}, pred.dtype()), row_loss.data(), samples,
                       pred.dtype(), norm_pix};
  check_patch_ids("ids_mask", args.ids_mask, "cu_mask", args.cu_mask, samples, rows, source.rows * source.columns);
  const Reduced out("loss", loss, reduction, rows, accumulator(pred.dtype()));
  const auto kernel = M3AE_DISPATCH(masked_mse);
  parallel_for(rows, grain_rows(patches.values()), [&](int64_t begin, int64_t end) {
    std::vector<double> target(static_cast<size_t>(patches.values() + kTargetPadding));
    kernel(args, target.data(), begin, end);
  });
  if (reduction == Reduction::none) {
    for (int64_t t = 0; t < rows; ++t) out.write(t, row_loss[t]);
    return;
  }
  double sum = 0;
  for (int64_t n = 0; n < args.images; ++n) {
    const double weight = row_weight(reduction, args.cu_mask, args.images, n);
    for (int64_t t = args.cu_mask[n]; t < args.cu_mask[n + 1]; ++t) sum += weight * row_loss[t];
  }
  out.write(0, sum);
}

void backward(const Tensor& dloss, const Tensor& error, const Tensor& cu_mask, const std::string& reduction_name,
              const Tensor& dpred) {
  const Reduction reduction = reduction_of(reduction_name);
  const int64_t rows = error.size(0), width = error.size(1), images = sequences_of("cu_mask", cu_mask);
  const int32_t* cu = cu_mask.int32s("cu_mask", {images + 1});
  check_offsets("cu_mask", cu, images, rows);
  const Dtype dtype = error.dtype(), accumulate = accumulator(dtype);
  const bool each = reduction == Reduction::none;
  const void* dlosses = each ? dloss.dense("dloss", {rows}, accumulate) : dloss.dense("dloss", {}, accumulate);
  std::vector<double> factors(static_cast<size_t>(rows), 0.0);
  for (int64_t n = 0; n < images; ++n) {
    const double weight = row_weight(reduction, cu, images, n);
    for (int64_t t = cu[n]; t < cu[n + 1]; ++t) {
      const int64_t at = each ? t : 0;
      factors[t] = weight * 2 / width * (dtype == Dtype::f64 ? as<double>(dlosses)[at] : as<float>(dlosses)[at]);
    }
  }
  const MaskedMseBackward args{error.dense("error", {rows, width}), factors.data(),
                               dpred.dense("dpred", {rows, width}, dtype), cu[images], width, dtype};
  const auto kernel = M3AE_DISPATCH(masked_mse_backward);
  parallel_for(width > 0 ? rows : 0, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void bind_masked_mse(py::module_& module) {
  bind(module, "masked_mse", forward, {"pred", "images", "ids_mask", "cu_mask", "patch_size", "norm_pix", "scale",
       "shift", "reduction", "loss", "error"});
  bind(module, "masked_mse_backward", backward, {"dloss", "error", "cu_mask", "reduction", "dpred"});
}

}  // namespace m3ae
