// Reading patches on a GPU: what patch_rows.h is to the CPU. A warp reads up to kWarpValues values of one patch,
// kValues a lane, with all loads of a lane in flight at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/numbers.cuh"
#include "ops/gather_patches/patches.h"

namespace m3ae::cuda {

constexpr int kPack = 8;     // neighboring values in a lane at most, where rows can be moved in packs; else one
constexpr int kValues = 24;  // of a lane: three packs
constexpr int kWarpValues = kWarp * kValues;  // 16 x 16 pixels of three channels
constexpr int kMaxChannels = 64;

// Division by a number that the host knows. Exact while dividend * by < 2^31.
struct Divide {
  uint32_t factor;  // 2^31 / by, rounded up

  explicit Divide(int64_t by) : factor(static_cast<uint32_t>(((int64_t{1} << 31) + by - 1) / by)) {}
  __device__ int operator()(int dividend) const {
    return static_cast<int>(uint64_t{2 * static_cast<uint32_t>(dividend)} * factor >> 32);
  }
};

// What reading takes beside a PatchSource: by value, since a kernel cannot read the host's memory.
struct PatchTables {
  int width, line;  // values of a patch, of a patch row
  Divide by_line, by_channels;
  float scale[kMaxChannels], shift[kMaxChannels];
};

inline PatchTables patch_tables(int64_t channels, int64_t patch, const std::vector<double>& scale,
                                const std::vector<double>& shift) {
  const int64_t line = patch * channels, width = patch * line;
  M3AE_CHECK(channels >= 1 && channels <= kMaxChannels, "images must have 1 to ", kMaxChannels,
             " channels for impl='cuda', got ", channels);
  const auto divides = [&](int64_t size) { return size * size * size * channels * channels < int64_t{1} << 31; };
  if (!divides(patch)) {
    int64_t limit = 1;
    while (divides(limit)) ++limit;
    value_error("patch_size must be less than ", limit, " for impl='cuda' and images of ", channels, " channels, got ",
                patch);
  }
  PatchTables tables{static_cast<int>(width), static_cast<int>(line), Divide(line), Divide(channels), {}, {}};
  std::copy(scale.begin(), scale.end(), tables.scale);
  std::copy(shift.begin(), shift.end(), tables.shift);
  return tables;
}

// The source, with the layout `strided`, which is read pixel by pixel, where packs of pixels are not aligned.
inline PatchSource read_in_packs(PatchSource s) {
  const int64_t size = size_of(s.dtype), bytes = std::min<int64_t>(16, kPack * size);
  const auto fits = [&](int64_t elements) { return elements * size % bytes == 0; };
  const int64_t run = s.layout == Layout::planes ? s.patch : s.patch * s.channels;
  if (reinterpret_cast<std::uintptr_t>(s.images) % static_cast<size_t>(bytes) != 0 || run % kPack != 0 ||
      !fits(s.stride_n) || !fits(s.stride_h) || (s.layout == Layout::planes && !fits(s.stride_c)))
    s.layout = Layout::strided;
  return s;
}

// As many as an instruction moves: eight floats would take two, each of which stores to half of every 32-byte sector.
template <class T>
constexpr int kPackOf = 16 / sizeof(T);

// Whether rows of values can be read and written in packs.
inline bool rows_in_packs(const void* address, int64_t width) {
  return width % kPack == 0 && reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// Bytes of shared memory in which `warps` warps turn pixels into the order of a row.
inline size_t staging(const PatchSource& s, bool packs, int warps) {
  return packs && s.layout == Layout::pixels ? 0 : static_cast<size_t>(warps * kWarpValues * size_of(s.dtype));
}

// Where a lane's i-th pack lies among its warp's values.
template <int pack>
__device__ __forceinline__ int pack_at(int i) {
  return (i * kWarp + static_cast<int>(threadIdx.x) % kWarp) * pack;
}

// Where a lane's i-th pack lies in a row of `width` values of which its warp holds those from `first` on. Packs past
// the row's end are its last instead, so that they can be loaded: a branch would let the next load wait for this one.
template <int pack>
__device__ __forceinline__ int pack_in_row(int first, int i, int width) {
  return min(first + pack_at<pack>(i), width - pack);
}

// function(Pixel{}) with the images' type. The same for all threads of a launch, so not worth kernels of its own.
template <class Function>
__device__ __forceinline__ void with_float_pixel(Dtype dtype, Function&& function) {
  if (dtype == Dtype::f32)
    function(float{});
  else if (dtype == Dtype::bf16)
    function(bfloat16{});
  else
    function(float16{});
}

template <class Function>
__device__ __forceinline__ void with_pixel(Dtype dtype, Function&& function) {
  if (dtype == Dtype::u8)
    function(uint8_t{});
  else
    with_float_pixel(dtype, function);
}

// Of what is never negative: half the instructions of a signed product.
__device__ __forceinline__ int64_t times(int index, int64_t stride) {
  return static_cast<int64_t>(uint64_t{static_cast<uint32_t>(index)} * static_cast<uint64_t>(stride));
}

// Pixel by pixel, of any strides: neighboring lanes read neighboring values.
template <class Pixel>
__device__ __forceinline__ void stage_strided(const PatchSource& s, const PatchTables& t, const Pixel* corner,
                                              int first, Pixel* staged) {
  constexpr int kBatch = 12;  // pixels of a lane that are in flight at a time; all of them would take its registers
#pragma unroll 1
  for (int start = 0; start < kValues; start += kBatch) {
    Pixel batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int d = pack_in_row<1>(first, start + i, t.width), y = t.by_line(d);
      const int in_line = d - y * t.line, x = t.by_channels(in_line);
      const int channel = in_line - x * static_cast<int>(s.channels);
      batch[i] = corner[times(y, s.stride_h) + times(x, s.stride_w) + times(channel, s.stride_c)];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) staged[pack_at<1>(start + i)] = batch[i];
  }
}

// Eight pixels of each of three planes a lane, as 24 values of the row.
template <class Pixel>
__device__ __forceinline__ void stage_planes(const PatchSource& s, const PatchTables& t, const Pixel* corner, int first,
                                             Pixel* staged) {
  static_assert(kValues == 3 * kPack);
  const int at = pack_at<kValues>(0), d = pack_in_row<kValues>(first, 0, t.width);
  const int y = t.by_line(d), x = (d - y * t.line) / 3;
  Pack<Pixel, kPack> planes[3], mixed[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) planes[c] = load<kPack>(corner + (c * s.stride_c + times(y, s.stride_h) + x));
#pragma unroll
  for (int k = 0; k < kValues; ++k) mixed[k / kPack].at[k % kPack] = planes[k % 3].at[k / 3];
#pragma unroll
  for (int k = 0; k < 3; ++k) store(staged + at + k * kPack, mixed[k]);
}

template <int pack, class Pixel>
__device__ __forceinline__ void read_pixels(const PatchSource& s, const PatchTables& t, const Pixel* corner, int first,
                                            float (&values)[kValues]) {
  Pack<Pixel, pack> raw[kValues / pack];
  if (pack > 1 && s.layout == Layout::pixels) {
#pragma unroll
    for (int i = 0; i < kValues / pack; ++i) {
      const int d = pack_in_row<pack>(first, i, t.width), y = t.by_line(d);
      raw[i] = load<pack>(corner + (times(y, s.stride_h) + (d - y * t.line)));
    }
  } else {
    Pixel* staged = dynamic_shared<Pixel>() + threadIdx.x / kWarp * kWarpValues;
    if (pack > 1 && s.layout == Layout::planes)
      stage_planes(s, t, corner, first, staged);
    else
      stage_strided(s, t, corner, first, staged);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kValues / pack; ++i) raw[i] = load<pack>(staged + pack_at<pack>(i));
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = widen(raw[i / pack].at[i % pack]);
}

// values * scale + shift, of the value's channel.
template <int pack>
__device__ __forceinline__ void normalize(const PatchSource& s, const PatchTables& t, int first,
                                          float (&values)[kValues]) {
  const int channels = static_cast<int>(s.channels);
  if (channels == 3) {  // a lane's channels follow one another the same way in each of its packs
    static_assert(kWarpValues % 3 == 0);
    float scale[3], shift[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int channel = (pack_at<pack>(0) + k) % 3;
      scale[k] = t.scale[channel];
      shift[k] = t.shift[channel];
    }
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      const int channel = (k / pack * pack * kWarp + k % pack) % 3;
      values[k] = multiply_add(values[k], scale[channel], shift[channel]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kValues / pack; ++i) {
    const int d = pack_in_row<pack>(first, i, t.width);
    int channel = d - t.by_channels(d) * channels;
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      values[i * pack + j] = multiply_add(values[i * pack + j], t.scale[channel], t.shift[channel]);
      if (++channel == channels) channel = 0;
    }
  }
}

// The normalized values of a patch from `first` on, in (row, column, channel) order: values[i * pack + j] is the one at
// first + pack_at<pack>(i) + j, past the patch's end any. By a whole warp.
template <int pack>
__device__ __forceinline__ void read_patch(const PatchSource& s, const PatchTables& t, int image, int id, int first,
                                           float (&values)[kValues]) {
  const int64_t corner = patch_offset(s, image, id);
  with_pixel(s.dtype, [&](auto pixel) {
    using Pixel = decltype(pixel);
    read_pixels<pack>(s, t, as<Pixel>(s.images) + corner, first, values);
  });
  normalize<pack>(s, t, first, values);
}

// The first of those values.
__device__ __forceinline__ float first_value(const PatchSource& s, const PatchTables& t, int image, int id) {
  const int64_t corner = patch_offset(s, image, id);
  float value = 0;
  with_pixel(s.dtype, [&](auto pixel) { value = widen(as<decltype(pixel)>(s.images)[corner]); });
  return multiply_add(value, t.scale[0], t.shift[0]);
}

}  // namespace m3ae::cuda
