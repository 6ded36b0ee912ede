// What the bindings of the ops that read patches take: images become a PatchSource, and are checked on the way.
#pragma once

#include <vector>

#include "ops/gather_patches/patches.h"
#include "tensor.h"

namespace m3ae {

// Whole patches, whose numbers within an image fit an int32.
inline void check_patches(int64_t patch, int64_t height, int64_t width) {
  M3AE_CHECK(patch > 0, "patch_size must be at least 1, got ", patch);
  M3AE_CHECK(height % patch == 0 && width % patch == 0, "images must be multiples of patch_size ", patch,
             " high and wide, got ", height, " x ", width);
  constexpr int64_t most = int64_t{1} << 31;
  M3AE_CHECK(height / patch < most && width / patch < most && (height / patch) * (width / patch) < most,
             "images must have less than 2^31 patches each, got ", height / patch, " x ", width / patch);
}

inline PatchSource patch_source(const Tensor& images, int64_t patch) {
  const int64_t channels = images.size(1);
  check_patches(patch, images.size(2), images.size(3));
  const bool on_end = images.stride(3) == channels && (channels == 1 || images.stride(1) == 1);
  return {images.any("images", {kAny, kAny, kAny, kAny}), nullptr, nullptr, images.stride(0), images.stride(1),
          images.stride(2), images.stride(3), channels, patch, images.size(2) / patch, images.size(3) / patch,
          on_end                                   ? Layout::pixels
          : channels == 3 && images.stride(3) == 1 ? Layout::planes
                                                   : Layout::strided,
          images.dtype()};
}

// A PatchSource and the tables it points to.
class Patches {
 public:
  // scale, shift: a value a channel. accumulator: f32 or f64.
  Patches(const Tensor& images, int64_t patch, const std::vector<double>& scale, const std::vector<double>& shift,
          Dtype accumulator)
      : source_(patch_source(images, patch)) {
    for (const auto* each : {&scale, &shift})
      M3AE_CHECK(static_cast<int64_t>(each->size()) == source_.channels, "scale and shift must have ",
                 source_.channels, " numbers, one a channel, got ", each->size());
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

// cu splits the first cu[images] rows among the images, each of which names a patch of its image.
inline void check_patch_ids(const char* ids_name, const int32_t* ids, const char* cu_name, const int32_t* cu,
                            int64_t images, int64_t rows, int64_t patches) {
  check_offsets(cu_name, cu, images, rows);
  for (int64_t t = 0; t < cu[images]; ++t)
    M3AE_CHECK(ids[t] >= 0 && ids[t] < patches, ids_name, " must be in [0, ", patches, "), an image's patches, got ",
               ids[t], " at row ", t);
}

}  // namespace m3ae
