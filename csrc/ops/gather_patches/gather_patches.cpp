#include "ops/gather_patches/gather_patches.h"

#include <pybind11/stl.h>

#include "cpu/threads.h"
#include "ops/gather_patches/arguments.h"

namespace py = pybind11;

namespace m3ae {
namespace {

void forward(const Tensor& images, const Tensor& ids, const Tensor& cu, int64_t patch_size,
             const std::vector<double>& scale, const std::vector<double>& shift, const Tensor& out) {
  const int64_t count = out.size(0), samples = images.size(0);
  const bool wide = images.dtype() == Dtype::f64 || out.dtype() == Dtype::f64;
  const Patches patches(images, patch_size, scale, shift, wide ? Dtype::f64 : Dtype::f32);
  const PatchSource& source = patches.source();
  const GatherPatches args{source, ids.int32s("ids", {count}), cu.int32s("seqlens", {samples + 1}),
                           out.dense("out", {count, patches.values()}), samples, out.dtype()};
  check_patch_ids("ids", args.ids, "seqlens", args.cu, samples, count, source.rows * source.columns);
  const auto kernel = M3AE_DISPATCH(gather_patches);
  parallel_for(count, grain_rows(patches.values()), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// dimages arrives zeroed, in the accumulation dtype.
void backward(const Tensor& dout, const Tensor& ids, const Tensor& cu, int64_t patch_size,
              const std::vector<double>& scale, const Tensor& dimages) {
  const int64_t count = dout.size(0), images = dimages.size(0), channels = dimages.size(1);
  check_patches(patch_size, dimages.size(2), dimages.size(3));
  M3AE_CHECK(static_cast<int64_t>(scale.size()) == channels, "scale must have ", channels,
             " numbers, one a channel, got ", scale.size());
  const GatherPatchesBackward args{dout.dense("dout", {count, patch_size * patch_size * channels}),
                                   ids.int32s("ids", {count}), cu.int32s("seqlens", {images + 1}),
                                   dimages.dense("dimages", {kAny, kAny, kAny, kAny}), scale.data(), channels,
                                   patch_size, dimages.size(2) / patch_size, dimages.size(3) / patch_size, dout.dtype(),
                                   dimages.dtype()};
  check_patch_ids("ids", args.ids, "seqlens", args.cu, images, count, args.rows * args.columns);
  const auto kernel = M3AE_DISPATCH(gather_patches_backward);
  parallel_for(images, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void bind_gather_patches(py::module_& module) {
  bind(module, "gather_patches", forward, {"images", "ids", "cu", "patch_size", "scale", "shift", "out"});
  bind(module, "gather_patches_backward", backward, {"dout", "ids", "cu", "patch_size", "scale", "dimages"});
}

}  // namespace m3ae
