// gather_patches: output rows, or images, [begin, end). Pure: no threads, no allocation.
#include "ops/gather_patches/gather_patches.h"

#include <cstring>

#include "ops/gather_patches/patch_rows.h"

namespace m3ae::M3AE_ISA {
namespace {

template <class Pixel, class Out>
void forward(const GatherPatches& a, int64_t begin, int64_t end) {
  using V = typename accumulate_in<Pixel, Out>::type;
  const int64_t width = a.source.patch * a.source.patch * a.source.channels;
  int64_t image = 0;
  for (int64_t t = begin; t < end; ++t) {
    Out* out = as<Out>(a.out) + t * width;
    image = image_of(a.cu, a.images, t, image);
    if (image == a.images) {
      std::memset(out, 0, static_cast<size_t>(width) * sizeof(Out));
      continue;
    }
    prefetch_patch<Pixel>(a.source, a.ids, a.cu, image, t);
    read_patch<V, Pixel>(a.source, image, a.ids[t], [&](int64_t d, V value, int n) { store_lanes(value, out + d, n); });
  }
}

// Rows of one image in order, so a patch named twice sums the same for any thread count.
template <class Out, class Accumulator>
void backward(const GatherPatchesBackward& a, int64_t begin, int64_t end) {
  const int64_t patch = a.patch, channels = a.channels, line = a.columns * patch, plane = a.rows * patch * line;
  for (int64_t image = begin; image < end; ++image) {
    for (int64_t t = a.cu[image]; t < a.cu[image + 1]; ++t) {
      const Out* dout = as<Out>(a.dout) + t * patch * patch * channels;
      Accumulator* corner = as<Accumulator>(a.dimages) + image * channels * plane + a.ids[t] / a.columns * patch * line +
                            a.ids[t] % a.columns * patch;
      for (int64_t c = 0; c < channels; ++c) {
        const Accumulator scale = static_cast<Accumulator>(a.scale[c]);
        for (int64_t y = 0; y < patch; ++y)
          for (int64_t x = 0; x < patch; ++x)
            corner[c * plane + y * line + x] +=
                Lane<Accumulator>::load(dout + (y * patch + x) * channels + c).v * scale;
      }
    }
  }
}

}  // namespace

void gather_patches(const GatherPatches& a, int64_t begin, int64_t end) {
  with_pixel(a.source, [&](auto pixel) {
    using Pixel = decltype(pixel);
    if (a.out_dtype == Dtype::f64) return forward<Pixel, double>(a, begin, end);
    if (a.out_dtype == Dtype::bf16) return forward<Pixel, bfloat16>(a, begin, end);
    forward<Pixel, float>(a, begin, end);
  });
}

void gather_patches_backward(const GatherPatchesBackward& a, int64_t begin, int64_t end) {
  if (a.dout_dtype == Dtype::f64) return backward<double, double>(a, begin, end);
  if (a.accumulator == Dtype::f64 && a.dout_dtype == Dtype::bf16) return backward<bfloat16, double>(a, begin, end);
  if (a.accumulator == Dtype::f64) return backward<float, double>(a, begin, end);
  if (a.dout_dtype == Dtype::bf16) return backward<bfloat16, float>(a, begin, end);
  backward<float, float>(a, begin, end);
}

}  // namespace m3ae::M3AE_ISA
