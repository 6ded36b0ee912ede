#include "ops/linear/linear.h"

#include <pybind11/pybind11.h>

#include "cpu/pages.h"
#include "cpu/reduce_rows.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

void forward(Address z, Address y, int64_t count, int activation, int dtype) {
  const LinearActivation args{pointer(z), pointer(y), Activation(activation), Dtype(dtype)};
  const auto kernel = M3AE_DISPATCH(linear_activation);
  if (y != z) prefer_huge_pages(pointer(y), count * size_of(args.dtype));
  parallel_for(count, kGrainElements, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// dbias: [width] accumulators (fp32; fp64 for Dtype::f64), 0: not wanted. dz: 0: not wanted.
void backward(Address dy, Address z, Address dz, Address dbias, int64_t count, int64_t width, int activation,
              int dtype) {
  const LinearActivationBackward args{pointer(dy), pointer(z),             pointer(dz),
                                      width,       Activation(activation), Dtype(dtype)};
  const auto kernel = M3AE_DISPATCH(linear_activation_backward);
  if (dz) prefer_huge_pages(pointer(dz), count * width * size_of(args.dtype));
  reduce_rows(count, width, args.dtype, pointer(dbias),
              [&](int64_t begin, int64_t end, void* sum) { kernel(args, sum, begin, end); });
}

}  // namespace

void bind_linear(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("linear_activation", &forward, no_gil);
  module.def("linear_activation_backward", &backward, no_gil);
}

}  // namespace m3ae
