// gather_patches on a GPU: a warp for every kWarpValues values of a patch. Backward, of a patch of the whole image,
// named or not: it looks for the rows that name it, in order, so that nothing has to be zeroed or sorted before.
#include "cuda/bind.h"
#include "cuda/sequences.cuh"
#include "ops/gather_patches/arguments.h"
#include "ops/gather_patches/gather_patches.h"
#include "ops/gather_patches/patch_rows.cuh"

namespace m3ae::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;

// A row for every warp along x, its parts of `share` values along y.
dim3 grid_of_rows(int64_t rows, int width, int share = kWarpValues) {
  dim3 blocks = grid((rows + kWarps - 1) / kWarps);
  blocks.y = static_cast<unsigned>((width + share - 1) / share);
  return blocks;
}

template <class Out, int pack>
__global__ void __launch_bounds__(kThreads)
    gather_patches_kernel(const __grid_constant__ GatherPatches a, const __grid_constant__ PatchTables t,
                          int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int first = static_cast<int>(blockIdx.y) * kWarpValues, id = a.ids[row];
  const int image = sequence_of(a.cu, a.images, row);
  float values[kValues] = {};
  if (image < a.images) read_patch<pack>(a.source, t, image, id, first, values);
  Out* out = as<Out>(a.out) + row * t.width + first;
#pragma unroll
  for (int i = 0; i < kValues / pack; ++i) {
    Pack<Out, pack> narrowed;
#pragma unroll
    for (int j = 0; j < pack; ++j) narrow(values[i * pack + j], narrowed.at[j]);
    if (first + pack_at<pack>(i) < t.width) store(out + pack_at<pack>(i), narrowed);
  }
}

// The patch whose gradient a warp writes, of the whole image; image: past the last where there is none.
struct Target {
  int64_t image;
  int place;   // in its image
  int64_t at;  // where its first pixel lies in the images' first channel, and how far channels and lines are apart
  int64_t channel_stride, line_stride;

  __device__ explicit Target(const GatherPatchesBackward& a) {
    const int64_t number = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, patches = a.rows * a.columns;
    image = number / patches;
    place = static_cast<int>(number - image * patches);
    line_stride = a.columns * a.patch;
    channel_stride = a.rows * a.patch * line_stride;
    at = image * a.channels * channel_stride + place / a.columns * a.patch * line_stride + place % a.columns * a.patch;
  }

  // add(row) for each row that names it, in order: 64 are looked at together.
  template <class Add>
  __device__ __forceinline__ void for_rows(const GatherPatchesBackward& a, const Add& add) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, end = a.cu[image + 1];
    for (int start = a.cu[image]; start < end; start += 2 * kWarp) {
      const int low = start + lane, high = low + kWarp;
      const int first = low < end ? a.ids[low] : -1, second = high < end ? a.ids[high] : -1;
      uint64_t named = __ballot_sync(kAllLanes, first == place);
      named |= uint64_t{__ballot_sync(kAllLanes, second == place)} << 32;
      for (; named != 0; named &= named - 1) add(int64_t{start} + __ffsll(static_cast<long long>(named)) - 1);
    }
  }
};

// For patches whose rows of pixels can be moved in packs. A warp takes `share` values, whole rows of its patch: it adds
// them up as they come, then turns them into the image's order in shared memory.
template <class Out>
__global__ void __launch_bounds__(kThreads, 7)
    gather_patches_backward_kernel(const __grid_constant__ GatherPatchesBackward a,
                                   const __grid_constant__ PatchTables t, Divide by_patch, int share, int64_t images) {
  constexpr int kPacks = kValues / kPack;
  const Target target(a);
  if (target.image >= images) return;
  const int first = static_cast<int>(blockIdx.y) * share, values = min(share, t.width - first);
  const int channels = static_cast<int>(a.channels), patch = static_cast<int>(a.patch);
  float sum[kValues] = {};
  target.for_rows(a, [&](int64_t row) {
    const Out* dout = as<Out>(a.dout) + row * t.width;
    Pack<Out, kPack> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = load<kPack>(dout + pack_in_row<kPack>(first, i, t.width));
#pragma unroll
    for (int k = 0; k < kValues; ++k) sum[k] += widen(packs[k / kPack].at[k % kPack]);
  });
  with_float_pixel(a.accumulator, [&](auto pixel) {
    using Pixel = decltype(pixel);
    constexpr int kPixels = 16 / sizeof(Pixel);
    Pixel* staged = dynamic_shared<Pixel>() + threadIdx.x / kWarp * kWarpValues;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int d = pack_in_row<kPack>(first, i, t.width);
      int channel = d - t.by_channels(d) * channels;
      Pack<Pixel, kPack> narrowed;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        narrow(sum[i * kPack + j] * t.scale[channel], narrowed.at[j]);
        if (++channel == channels) channel = 0;
      }
      store(staged + pack_at<kPack>(i), narrowed);
    }
    __syncwarp();
    const int64_t corner = target.at + first / t.line * target.line_stride;
#pragma unroll
    for (int i = 0; i < kValues / kPixels; ++i) {
      const int d = pack_at<kPixels>(i), line = by_patch(d), x = d - line * patch;  // by row, channel and column
      const int y = t.by_channels(line), channel = line - y * channels;
      if (d >= values) continue;
      Pack<Pixel, kPixels> pixels;
#pragma unroll
      for (int j = 0; j < kPixels; ++j) pixels.at[j] = staged[(y * patch + x + j) * channels + channel];
      const int64_t at = corner + channel * target.channel_stride + y * target.line_stride + x;
      store_at(as<Pixel>(a.dimages), at, pixels);
    }
  });
}

// For any patches: value by value, counted in the image's order, by channel, row and column.
template <class Out>
__global__ void __launch_bounds__(kThreads, 4)
    gather_patches_backward_by_one_kernel(const __grid_constant__ GatherPatchesBackward a,
                                          const __grid_constant__ PatchTables t, Divide by_patch, int64_t images) {
  const Target target(a);
  if (target.image >= images) return;
  const int first = static_cast<int>(blockIdx.y) * kWarpValues;
  const int channels = static_cast<int>(a.channels), patch = static_cast<int>(a.patch);
  int from[kValues];  // within a row
  float sum[kValues] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int d = pack_in_row<1>(first, i, t.width), line = by_patch(d), channel = by_patch(line);
    from[i] = ((line - channel * patch) * patch + d - line * patch) * channels + channel;
  }
  target.for_rows(a, [&](int64_t row) {
    const Out* dout = as<Out>(a.dout) + row * t.width;
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum[i] += widen(dout[from[i]]);
  });
  with_float_pixel(a.accumulator, [&](auto pixel) {
    using Pixel = decltype(pixel);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int d = first + pack_at<1>(i), line = by_patch(d), channel = by_patch(line);
      if (d >= t.width) continue;
      const int64_t at = channel * target.channel_stride + (line - channel * patch) * target.line_stride;
      narrow(sum[i] * t.scale[channel], as<Pixel>(a.dimages)[target.at + at + d - line * patch]);
    }
  });
}

void forward(const Tensor& images, const Tensor& ids, const Tensor& cu, int64_t patch_size,
             const std::vector<double>& scale, const std::vector<double>& shift, const Tensor& out) {
  const int64_t rows = out.size(0), samples = images.size(0);
  const PatchTables tables = patch_tables(images.size(1), patch_size, scale, shift);
  const GatherPatches args{read_in_packs(patch_source(images, patch_size)), ids.int32s("ids", {rows}),
                           cu.int32s("seqlens", {samples + 1}), out.dense("out", {rows, tables.width}), samples,
                           out.dtype()};
  const bool packs = rows_in_packs(args.out, tables.width);
  const size_t shared = staging(args.source, packs, kWarps);
  with_float(args.out_dtype, [&](auto type) {
    using Out = typename decltype(type)::type;
    launch("gather_patches_kernel", packs ? gather_patches_kernel<Out, kPackOf<Out>> : gather_patches_kernel<Out, 1>,
           grid_of_rows(rows, tables.width), kThreads, shared, stream_of(out), args, tables, rows);
  });
}

void backward(const Tensor& dout, const Tensor& ids, const Tensor& cu, int64_t patch_size,
              const std::vector<double>& scale, const Tensor& dimages) {
  const int64_t rows = dout.size(0), images = dimages.size(0), channels = dimages.size(1);
  const PatchTables tables = patch_tables(channels, patch_size, scale, {});
  const GatherPatchesBackward args{dout.dense("dout", {rows, tables.width}), ids.int32s("ids", {rows}),
                                   cu.int32s("seqlens", {images + 1}),
                                   dimages.dense("dimages", {kAny, kAny, kAny, kAny}), nullptr, channels, patch_size,
                                   dimages.size(2) / patch_size, dimages.size(3) / patch_size, dout.dtype(),
                                   dimages.dtype()};
  const int64_t patches = images * args.rows * args.columns;
  const int lines = kWarpValues / tables.line, share = lines * tables.line;
  const bool packs = rows_in_packs(args.dimages, patch_size) && rows_in_packs(args.dout, patch_size) && lines > 0;
  const size_t shared = static_cast<size_t>(kWarps * kWarpValues * size_of(args.accumulator));
  const Stream stream = stream_of(dout);
  with_float(args.dout_dtype, [&](auto type) {
    using Out = typename decltype(type)::type;
    if (packs)
      M3AE_LAUNCH(gather_patches_backward_kernel<Out>, grid_of_rows(patches, tables.width, share), kThreads, shared,
                  stream, args, tables, Divide(patch_size), share, images);
    else
      M3AE_LAUNCH(gather_patches_backward_by_one_kernel<Out>, grid_of_rows(patches, tables.width), kThreads, 0, stream,
                  args, tables, Divide(patch_size), images);
  });
}

}  // namespace

void bind_gather_patches(pybind11::module_& module) {
  bind(module, "gather_patches", forward, {"images", "ids", "cu", "patch_size", "scale", "shift", "out"});
  bind(module, "gather_patches_backward", backward, {"dout", "ids", "cu", "patch_size", "scale", "dimages"});
}

}  // namespace m3ae::cuda
