#include "ops/layer_norm/layer_norm.h"

#include <pybind11/pybind11.h>

#include "cpu/pages.h"
#include "cpu/reduce_rows.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

void forward(Address x, Address residual, Address weight, Address bias, Address y, Address s, Address stats,
             int64_t count, int64_t width, double eps, int x_dtype, int residual_dtype, int y_dtype, int s_dtype) {
  const LayerNorm args{pointer(x), pointer(residual), pointer(weight), pointer(bias),  pointer(y),
                       pointer(s), pointer(stats),    count,           width,          eps,
                       Dtype(x_dtype), Dtype(residual_dtype), Dtype(y_dtype)};
  prefer_huge_pages(pointer(y), count * width * size_of(Dtype(y_dtype)));
  if (s) prefer_huge_pages(pointer(s), count * width * size_of(Dtype(s_dtype)));
  const auto kernel = M3AE_DISPATCH(layer_norm);
  parallel_for(count, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// dparams: accumulators [2][width], dweight and dbias; null: not wanted.
void backward(Address dy, Address ds, Address s, Address weight, Address stats, Address dx, Address dparams,
              int64_t count, int64_t width, int s_dtype, int y_dtype) {
  const LayerNormBackward args{pointer(dy), pointer(ds), pointer(s), pointer(weight), pointer(stats),
                               pointer(dx), count,       width,      Dtype(s_dtype),  Dtype(y_dtype)};
  if (dx) prefer_huge_pages(pointer(dx), count * width * size_of(Dtype(s_dtype)));
  const auto kernel = M3AE_DISPATCH(layer_norm_backward);
  reduce_rows(count, 2 * width, Dtype(s_dtype), pointer(dparams),
              [&](int64_t begin, int64_t end, void* partial) { kernel(args, begin, end, partial); });
}

}  // namespace

void bind_layer_norm(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("layer_norm", &forward, no_gil);
  module.def("layer_norm_backward", &backward, no_gil);
}

}  // namespace m3ae
