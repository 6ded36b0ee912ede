// Reading patches, for kernels: the one place that knows how images lie in memory.
#pragma once

#include "cpu/vec.h"
#include "ops/gather_patches/patches.h"

namespace m3ae::M3AE_ISA {

// The image whose rows include `row`, at or after `image`; `images` for rows past the last.
M3AE_INLINE int64_t image_of(const int32_t* cu, int64_t images, int64_t row, int64_t image) {
  while (image < images && row >= cu[image + 1]) ++image;
  return image;
}

// function(Pixel{}) with the pixels' type.
template <class Function>
M3AE_INLINE void with_pixel(const PatchSource& source, Function&& function) {
  switch (source.dtype) {
    case Dtype::u8: return function(uint8_t{});
    case Dtype::f32: return function(float{});
    case Dtype::bf16: return function(bfloat16{});
    case Dtype::f64: return function(double{});
    case Dtype::f16: return;  // on GPUs alone
  }
}

// fp32, or fp64 where either side is: what pixels of type Pixel meeting values of type Value are computed in.
template <class Pixel, class Value>
struct accumulate_in { using type = Vec<Value>; };
template <class Value>
struct accumulate_in<double, Value> { using type = Vec<double>; };

template <class Pixel>
M3AE_INLINE const Pixel* patch_corner(const PatchSource& s, int64_t image, int32_t id) {
  return as<Pixel>(s.images) + patch_offset(s, image, id);
}

// Patches lie in short pieces, a line of the image apart, which the hardware does not foresee. Called for row t, asks for
// the pixels of row t + 2, into the second level of cache: the first waits for too few lines at a time.
template <class Pixel>
M3AE_INLINE void prefetch_patch(const PatchSource& s, const int32_t* ids, const int32_t* cu, int64_t image, int64_t t) {
  if (t + 2 >= cu[image + 1]) return;
  const Pixel* corner = patch_corner<Pixel>(s, image, ids[t + 2]);
  const int planes = s.layout == Layout::planes ? 3 : 1;
  for (int c = 0; c < planes; ++c)
    for (int64_t y = 0; y < s.patch; ++y) __builtin_prefetch(corner + c * s.stride_c + y * s.stride_h, 0, 2);
}

// body(offset, values, n): the patch's normalized values in (row, column, channel) order, a vector at a time.
template <class V, class Pixel, class Body>
M3AE_INLINE void read_patch(const PatchSource& s, int64_t image, int32_t id, Body&& body) {
  using Scalar = typename V::scalar;
  const Scalar *scale = as<Scalar>(s.scale), *shift = as<Scalar>(s.shift);
  const int64_t width = s.patch * s.channels;
  const Pixel* corner = patch_corner<Pixel>(s, image, id);
  if (s.layout == Layout::pixels) {
    for (int64_t y = 0; y < s.patch; ++y) {
      const Pixel* pixels = corner + y * s.stride_h;
      for_lanes<V>(width, [&](int64_t d, int n) {
        const V value = load_lanes<V>(pixels + d, n) * load_lanes<V>(scale + d, n) + load_lanes<V>(shift + d, n);
        body(y * width + d, value, n);
      });
    }
  } else if (s.layout == Layout::planes) {
    V scales[3], shifts[3];
    for (int c = 0; c < 3; ++c) scales[c] = V::set(scale[c]), shifts[c] = V::set(shift[c]);
    for (int64_t y = 0; y < s.patch; ++y) {
      const Pixel* pixels = corner + y * s.stride_h;
      for_lanes<V>(s.patch, [&](int64_t x, int n) {
        V planes[3], values[3];
        for (int c = 0; c < 3; ++c)
          planes[c] = load_lanes<V>(pixels + c * s.stride_c + x, n) * scales[c] + shifts[c];
        V::interleave3(planes[0], planes[1], planes[2], values);
        for (int k = 0; k < 3 && k * V::width < 3 * n; ++k) {
          const int left = 3 * n - k * V::width;
          body(y * width + 3 * x + k * V::width, values[k], left < V::width ? left : V::width);
        }
      });
    }
  } else {
    for (int64_t y = 0; y < s.patch; ++y) {
      const Pixel* pixel = corner + y * s.stride_h;
      int64_t channel = 0;
      for_lanes<V>(width, [&](int64_t d, int n) {
        Scalar gathered[V::width] = {};
        for (int i = 0; i < n; ++i) {
          gathered[i] = Lane<Scalar>::load(pixel + channel * s.stride_c).v;
          if (++channel == s.channels) channel = 0, pixel += s.stride_w;
        }
        body(y * width + d, V::load(gathered) * load_lanes<V>(scale + d, n) + load_lanes<V>(shift + d, n), n);
      });
    }
  }
}

}  // namespace m3ae::M3AE_ISA
