#include "ops/masked_mse/masked_mse.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

// What the loss of a row of image n is multiplied with before all are added up.
std::vector<double> row_weights(const std::string& reduction, const int32_t* cu, int64_t images) {
  std::vector<double> weights(static_cast<size_t>(images), 1.0);
  for (int64_t n = 0; n < images; ++n) {
    if (reduction == "mean") weights[n] = 1.0 / (cu[images] > 0 ? cu[images] : 1);
    if (reduction == "sample_mean") weights[n] = 1.0 / images / (cu[n + 1] > cu[n] ? cu[n + 1] - cu[n] : 1);
  }
  return weights;
}

// images, pred and where they meet: the arguments of both passes.
struct Call {
  Patches patches;
  MaskedMse args;

  Call(Address pred, int pred_dtype, int64_t rows, Address images, int dtype, const std::array<int64_t, 4>& shape,
       const std::array<int64_t, 4>& strides, int64_t patch, const std::vector<double>& scale,
       const std::vector<double>& shift, Address ids, Address cu, bool norm_pix)
      : patches(images, dtype, shape, strides, patch, scale, shift,
                Dtype(dtype) == Dtype::f64 || Dtype(pred_dtype) == Dtype::f64 ? Dtype::f64 : Dtype::f32),
        args{patches.source(), int32s(ids), int32s(cu), pointer(pred), shape[0], Dtype(pred_dtype), norm_pix} {
    check_patch_ids("ids_mask", args.ids, "cu_mask", args.cu, args.images, rows, args.source.rows * args.source.columns);
  }

  // body(scratch for a target, begin, end) over shares of the rows.
  template <class Body>
  void for_rows(int64_t rows, const Body& body) const {
    parallel_for(rows, grain_rows(patches.values()), [&](int64_t begin, int64_t end) {
      std::vector<double> target(static_cast<size_t>(patches.values() + kTargetPadding));
      body(target.data(), begin, end);
    });
  }
};

// loss: one, or with reduction "none" one a row; fp64 where pred is, else fp32.
void forward(Address pred, int pred_dtype, int64_t rows, Address images, int dtype, std::array<int64_t, 4> shape,
             std::array<int64_t, 4> strides, int64_t patch, const std::vector<double>& scale,
             const std::vector<double>& shift, Address ids, Address cu, bool norm_pix, const std::string& reduction,
             Address loss) {
  const Call call(pred, pred_dtype, rows, images, dtype, shape, strides, patch, scale, shift, ids, cu, norm_pix);
  const MaskedMse& args = call.args;
  std::vector<double> row_loss(static_cast<size_t>(rows), 0.0);  // zero past the last image's
  const auto kernel = M3AE_DISPATCH(masked_mse);
  call.for_rows(args.cu[args.images], [&](void* target, int64_t begin, int64_t end) {
    kernel(args, target, row_loss.data(), begin, end);
  });
  const auto write = [&](int64_t at, double value) {
    if (args.pred_dtype == Dtype::f64)
      as<double>(pointer(loss))[at] = value;
    else
      as<float>(pointer(loss))[at] = static_cast<float>(value);
  };
  if (reduction == "none") {
    for (int64_t t = 0; t < rows; ++t) write(t, row_loss[t]);
    return;
  }
  const std::vector<double> weights = row_weights(reduction, args.cu, args.images);
  double sum = 0;
  for (int64_t n = 0; n < args.images; ++n)
    for (int64_t t = args.cu[n]; t < args.cu[n + 1]; ++t) sum += weights[n] * row_loss[t];
  write(0, sum);
}

void backward(Address pred, int pred_dtype, int64_t rows, Address images, int dtype, std::array<int64_t, 4> shape,
              std::array<int64_t, 4> strides, int64_t patch, const std::vector<double>& scale,
              const std::vector<double>& shift, Address ids, Address cu, bool norm_pix, const std::string& reduction,
              Address dloss, Address dpred) {
  const Call call(pred, pred_dtype, rows, images, dtype, shape, strides, patch, scale, shift, ids, cu, norm_pix);
  const std::vector<double> weights = row_weights(reduction, call.args.cu, call.args.images);
  const MaskedMseBackward args{call.args, weights.data(), pointer(dloss), pointer(dpred), reduction == "none" ? 1 : 0};
  const auto kernel = M3AE_DISPATCH(masked_mse_backward);
  call.for_rows(rows, [&](void* target, int64_t begin, int64_t end) { kernel(args, target, begin, end); });
}

}  // namespace

void bind_masked_mse(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("masked_mse", &forward, no_gil);
  module.def("masked_mse_backward", &backward, no_gil);
}

}  // namespace m3ae
