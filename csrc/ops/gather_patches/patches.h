// Images of any strides and how their patches are read: what gather_patches and masked_mse take. The kernels' half is
// patch_rows.h, on a GPU patch_rows.cuh.
#pragma once

#include "dtype.h"

namespace m3ae {

enum class Layout : int {
  pixels,  // a patch row is patch * channels values on end: channels-last, or one channel
  planes,  // three channels, each with its pixels on end
  strided,
};

// value = pixel * scale + shift. Sizes and strides in elements.
struct PatchSource {
  const void* images;  // [N, channels, height, width]
  const void* scale;   // [patch * channels], one patch row, in the accumulation type; not on a GPU: PatchTables
  const void* shift;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t channels, patch;
  int64_t rows, columns;  // patches down and across an image
  Layout layout;
  Dtype dtype;
};

// How far a patch's first pixel lies from the images' first.
M3AE_HOST_DEVICE int64_t patch_offset(const PatchSource& s, int64_t image, int32_t id) {
  const int32_t columns = static_cast<int32_t>(s.columns);
  return image * s.stride_n + id / columns * s.patch * s.stride_h + id % columns * s.patch * s.stride_w;
}

}  // namespace m3ae
