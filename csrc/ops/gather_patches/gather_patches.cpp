#include "ops/gather_patches/gather_patches.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

void forward(Address images, int dtype, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides, int64_t patch,
             const std::vector<double>& scale, const std::vector<double>& shift, Address ids, Address cu, Address out,
             int64_t count, int out_dtype) {
  const bool wide = Dtype(dtype) == Dtype::f64 || Dtype(out_dtype) == Dtype::f64;
  const Patches patches(images, dtype, shape, strides, patch, scale, shift, wide ? Dtype::f64 : Dtype::f32);
  const PatchSource& source = patches.source();
  check_patch_ids("ids", int32s(ids), "seqlens", int32s(cu), shape[0], count, source.rows * source.columns);
  const GatherPatches args{source, int32s(ids), int32s(cu), pointer(out), shape[0], Dtype(out_dtype)};
  const auto kernel = M3AE_DISPATCH(gather_patches);
  parallel_for(count, grain_rows(patches.values()), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// dimages arrives zeroed.
void backward(Address dout, Address ids, Address cu, Address dimages, std::array<int64_t, 4> shape, int64_t patch,
              const std::vector<double>& scale, int dout_dtype, int accumulator) {
  const auto [images, channels, height, width] = shape;
  const GatherPatchesBackward args{pointer(dout),     int32s(ids), int32s(cu), pointer(dimages),
                                   scale.data(),      channels,    patch,      height / patch,
                                   width / patch,     Dtype(dout_dtype),       Dtype(accumulator)};
  const auto kernel = M3AE_DISPATCH(gather_patches_backward);
  parallel_for(images, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void bind_gather_patches(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("gather_patches", &forward, no_gil);
  module.def("gather_patches_backward", &backward, no_gil);
}

}  // namespace m3ae
