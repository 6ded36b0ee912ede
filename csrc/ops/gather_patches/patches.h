// Images of any strides and how their patches are read: what gather_patches and masked_mse take. The kernels' half is
// patch_rows.h, on a GPU patch_rows.cuh.
#pragma once

#include <array>
#include <vector>

#include "check.h"
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

// shape, strides: of [N, C, H, W].
inline PatchSource patch_source(Address images, int dtype, const std::array<int64_t, 4>& shape,
                                const std::array<int64_t, 4>& strides, int64_t patch) {
  const auto [stride_n, stride_c, stride_h, stride_w] = strides;
  const int64_t channels = shape[1];
  const bool on_end = stride_w == channels && (channels == 1 || stride_c == 1);
  return {pointer(images), nullptr,  nullptr, stride_n,         stride_c,         stride_h,
          stride_w,        channels, patch,   shape[2] / patch, shape[3] / patch,
          on_end                           ? Layout::pixels
          : channels == 3 && stride_w == 1 ? Layout::planes
                                           : Layout::strided,
          Dtype(dtype)};
}

// How far a patch's first pixel lies from the images' first.
M3AE_HOST_DEVICE int64_t patch_offset(const PatchSource& s, int64_t image, int32_t id) {
  const int32_t columns = static_cast<int32_t>(s.columns);
  return image * s.stride_n + id / columns * s.patch * s.stride_h + id % columns * s.patch * s.stride_w;
}

// A PatchSource and the tables it points to.
class Patches {
 public:
  // scale, shift: a value a channel. accumulator: f32 or f64.
  Patches(Address images, int dtype, const std::array<int64_t, 4>& shape, const std::array<int64_t, 4>& strides,
          int64_t patch, const std::vector<double>& scale, const std::vector<double>& shift, Dtype accumulator)
      : source_(patch_source(images, dtype, shape, strides, patch)) {
    if (accumulator == Dtype::f64) {
      fill(scale64_, scale, source_.scale);
      fill(shift64_, shift, source_.shift);
    } else {
      fill(scale32_, scale, source_.scale);
      fill(shift32_, shift, source_.shift);
    }
  }
  Patches(const Patches&) = delete;

  const PatchSource& source() const { return source_; }
  int64_t values() const { return source_.patch * source_.patch * source_.channels; }  // of one patch

 private:
  template <class T>
  void fill(std::vector<T>& table, const std::vector<double>& per_channel, const void*& out) {
    for (int64_t x = 0; x < source_.patch; ++x)
      for (double value : per_channel) table.push_back(static_cast<T>(value));
    out = table.data();
  }

  PatchSource source_;
  std::vector<float> scale32_, shift32_;
  std::vector<double> scale64_, shift64_;
};

// cu splits the first cu[images] of `rows` rows among the images, each of which names a patch of its image.
inline void check_patch_ids(const char* ids_name, const int32_t* ids, const char* cu_name, const int32_t* cu,
                            int64_t images, int64_t rows, int64_t patches) {
  M3AE_CHECK(cu[0] == 0, cu_name, " must start at 0, got ", cu[0]);
  for (int64_t n = 0; n < images; ++n)
    M3AE_CHECK(cu[n] <= cu[n + 1], cu_name, " must not descend, got ", cu[n], " then ", cu[n + 1]);
  M3AE_CHECK(cu[images] <= rows, cu_name, " must end at or before the last of ", rows, " rows, got ", cu[images]);
  for (int64_t t = 0; t < cu[images]; ++t)
    M3AE_CHECK(ids[t] >= 0 && ids[t] < patches, ids_name, " must be in [0, ", patches, "), an image's patches, got ",
               ids[t], " at row ", t);
}

}  // namespace m3ae
