// gather_patches on a GPU: a warp for every kWarpValues values of a patch. Backward, of a patch of the whole image,
// named or not: it looks for the rows that name it, in order, so that nothing has to be zeroed or sorted before.
#include "cuda/bind.h"
#include "cuda/sequences.cuh"
#include "ops/gather_patches/gather_patches.h"
#include "ops/gather_patches/patch_rows.cuh"

namespace m3ae::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;

// A row for every warp along x, its parts along y.
dim3 grid_of_rows(int64_t rows, int width) {
  dim3 blocks = grid((rows + kWarps - 1) / kWarps);
  blocks.y = static_cast<unsigned>((width + kWarpValues - 1) / kWarpValues);
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

// Where values of a patch lie that are counted in the image's order: by channel, row and column.
struct ImageOrder {
  struct At {
    int channel, y, x;
  };
  int patch;
  Divide by_patch;

  __device__ At operator()(int d) const {
    const int line = by_patch(d), channel = by_patch(line);
    return {channel, line - channel * patch, d - line * patch};
  }
};

template <class Out, int pack>
__global__ void __launch_bounds__(kThreads, 4)
    gather_patches_backward_kernel(const __grid_constant__ GatherPatchesBackward a,
                                   const __grid_constant__ PatchTables t, ImageOrder order, int64_t images) {
  constexpr int kPacks = kValues / pack;
  const int64_t number = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, patches = a.rows * a.columns;
  const int64_t image = number / patches;
  if (image >= images) return;
  const int place = static_cast<int>(number - image * patches), columns = static_cast<int>(a.columns);
  const int channels = static_cast<int>(a.channels), first = static_cast<int>(blockIdx.y) * kWarpValues;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, begin = a.cu[image], end = a.cu[image + 1];
  int from[kPacks];  // within a row
  float sum[kValues] = {};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const auto [channel, y, x] = order(pack_in_row<pack>(first, i, t.width));
    from[i] = (y * order.patch + x) * channels + channel;
  }
  for (int start = begin; start < end; start += kWarp) {
    const bool mine = start + lane < end && a.ids[start + lane] == place;
    for (unsigned named = __ballot_sync(kAllLanes, mine); named != 0; named &= named - 1) {
      const Out* dout = as<Out>(a.dout) + int64_t{start + __ffs(named) - 1} * t.width;
#pragma unroll
      for (int k = 0; k < kValues; ++k) sum[k] += widen(dout[from[k / pack] + k % pack * channels]);
    }
  }
  const int64_t line = a.columns * a.patch, height = a.rows * a.patch;
  const int64_t top = place / columns * a.patch, left = place % columns * a.patch;
  with_float_pixel(a.accumulator, [&](auto pixel) {
    using Pixel = decltype(pixel);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (first + pack_at<pack>(i) >= t.width) continue;
      const auto [channel, y, x] = order(first + pack_at<pack>(i));
      const float scale = t.scale[channel];
      Pack<Pixel, pack> narrowed;
#pragma unroll
      for (int j = 0; j < pack; ++j) narrow(sum[i * pack + j] * scale, narrowed.at[j]);
      store(as<Pixel>(a.dimages) + ((image * channels + channel) * height + top + y) * line + left + x, narrowed);
    }
  });
}

void forward(Address images, int dtype, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides, int64_t patch,
             const std::vector<double>& scale, const std::vector<double>& shift, Address ids, Address cu, Address out,
             int64_t rows, int out_dtype, int device, Address on) {
  const PatchTables tables = patch_tables(shape[1], patch, scale, shift);
  const GatherPatches args{read_in_packs(patch_source(images, dtype, shape, strides, patch)),
                           int32s(ids),
                           int32s(cu),
                           pointer(out),
                           shape[0],
                           Dtype(out_dtype)};
  const bool packs = rows_in_packs(args.out, tables.width);
  const size_t shared = staging(args.source, packs, kWarps);
  with_float(args.out_dtype, [&](auto type) {
    using Out = typename decltype(type)::type;
    launch("gather_patches_kernel", packs ? gather_patches_kernel<Out, kPack> : gather_patches_kernel<Out, 1>,
           grid_of_rows(rows, tables.width), kThreads, shared, Stream{device, on}, args, tables, rows);
  });
}

void backward(Address dout, Address ids, Address cu, Address dimages, std::array<int64_t, 4> shape, int64_t patch,
              const std::vector<double>& scale, int dout_dtype, int dtype, int device, Address on) {
  const PatchTables tables = patch_tables(shape[1], patch, scale, {});
  const GatherPatchesBackward args{pointer(dout),    int32s(ids), int32s(cu), pointer(dimages),
                                   nullptr,          shape[1],    patch,      shape[2] / patch,
                                   shape[3] / patch, Dtype(dout_dtype),       Dtype(dtype)};
  const int64_t patches = shape[0] * args.rows * args.columns;
  const ImageOrder order{static_cast<int>(patch), Divide(patch)};
  const bool packs = rows_in_packs(args.dimages, patch);
  with_float(args.dout_dtype, [&](auto type) {
    using Out = typename decltype(type)::type;
    launch("gather_patches_backward_kernel",
           packs ? gather_patches_backward_kernel<Out, kPack> : gather_patches_backward_kernel<Out, 1>,
           grid_of_rows(patches, tables.width), kThreads, 0, Stream{device, on}, args, tables, order, shape[0]);
  });
}

}  // namespace

void bind_gather_patches(pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  module.def("gather_patches", &forward, no_gil);
  module.def("gather_patches_backward", &backward, no_gil);
}

}  // namespace m3ae::cuda
