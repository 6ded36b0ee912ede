#include "ops/masked_mse/masked_mse.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

// loss: one, or with reduction "none" one a row; fp64 where pred is, else fp32.
void forward(Address pred, int pred_dtype, int64_t rows, Address images, int dtype, std::array<int64_t, 4> shape,
             std::array<int64_t, 4> strides, int64_t patch, const std::vector<double>& scale,
             const std::vector<double>& shift, Address ids, Address cu, bool norm_pix,
             const std::string& reduction_name, Address loss, Address error) {
  const Reduction reduction = reduction_of(reduction_name);
  const bool wide = Dtype(dtype) == Dtype::f64 || Dtype(pred_dtype) == Dtype::f64;
  const Patches patches(images, dtype, shape, strides, patch, scale, shift, wide ? Dtype::f64 : Dtype::f32);
  const PatchSource& source = patches.source();
  check_patch_ids("ids_mask", int32s(ids), "cu_mask", int32s(cu), shape[0], rows, source.rows * source.columns);
  std::vector<double> row_loss(static_cast<size_t>(rows));
  const MaskedMse args{source,          int32s(ids), int32s(cu),        pointer(pred), pointer(error),
                       row_loss.data(), shape[0],    Dtype(pred_dtype), norm_pix};
  const auto kernel = M3AE_DISPATCH(masked_mse);
  parallel_for(rows, grain_rows(patches.values()), [&](int64_t begin, int64_t end) {
    std::vector<double> target(static_cast<size_t>(patches.values() + kTargetPadding));
    kernel(args, target.data(), begin, end);
  });
  const auto write = [&](int64_t at, double value) {
    if (args.pred_dtype == Dtype::f64)
      as<double>(pointer(loss))[at] = value;
    else
      as<float>(pointer(loss))[at] = static_cast<float>(value);
  };
  if (reduction == Reduction::none) {
    for (int64_t t = 0; t < rows; ++t) write(t, row_loss[t]);
    return;
  }
  double sum = 0;
  for (int64_t n = 0; n < args.images; ++n) {
    const double weight = row_weight(reduction, args.cu, args.images, n);
    for (int64_t t = args.cu[n]; t < args.cu[n + 1]; ++t) sum += weight * row_loss[t];
  }
  write(0, sum);
}

void backward(Address dloss, Address error, int dtype, int64_t rows, int64_t width, Address cu, int64_t images,
              const std::string& reduction_name, Address dpred) {
  const Reduction reduction = reduction_of(reduction_name);
  std::vector<double> factors(static_cast<size_t>(rows), 0.0);
  for (int64_t n = 0; n < images; ++n) {
    const double weight = row_weight(reduction, int32s(cu), images, n);
    for (int64_t t = int32s(cu)[n]; t < int32s(cu)[n + 1]; ++t) {
      const int64_t at = reduction == Reduction::none ? t : 0;
      const bool wide = Dtype(dtype) == Dtype::f64;
      factors[t] = weight * 2 / width * (wide ? as<double>(pointer(dloss))[at] : as<float>(pointer(dloss))[at]);
    }
  }
  const MaskedMseBackward args{pointer(error), factors.data(), pointer(dpred), int32s(cu)[images], width, Dtype(dtype)};
  const auto kernel = M3AE_DISPATCH(masked_mse_backward);
  parallel_for(rows, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void bind_masked_mse(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("masked_mse", &forward, no_gil);
  module.def("masked_mse_backward", &backward, no_gil);
}

}  // namespace m3ae
