// masked_mse on a GPU: a row's targets stay in the registers of its warp, or warps, for mean, variance, loss and error.
// Every block leaves one partial sum of weighted losses; the last to finish adds them up.
#include "cuda/bind.h"
#include "cuda/partials.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sequences.cuh"
#include "ops/gather_patches/arguments.h"
#include "ops/gather_patches/patch_rows.cuh"
#include "ops/masked_mse/masked_mse.h"
#include "ops/masked_mse/row_weight.h"

namespace m3ae::cuda {
namespace {

constexpr int kRows = 4;        // of a block at a time, where a row takes one warp
constexpr int kMostWarps = 12;  // of a row

// That share a multiprocessor's registers, so 96 each: with 80, as left to itself, the compiler would spill. Where rows
// are not moved in packs it takes 128.
constexpr int kThreads = 640;

// Of the forward pass, which take rows in turn: twice what 132 multiprocessors hold, five each, where a row takes one
// warp. With a block for each four of 256 x 147 rows there would be 9,408 arrivals, and at its arrival a block asks for
// no rows for some 0.8 us: each multiprocessor 14 times, with all five blocks, against the 33 us that the memory takes.
// Here it is twice, and the last block reads its ten partial sums a thread together: less than the 2 to 3 us of a
// second launch. (H200; reasoned, not measured.) A constant: the same bits on any machine.
constexpr int kMostBlocks = 10 * 132;

// Over the lanes of a row: a warp's, or all of the block's.
struct RowSum {
  bool alone;  // one warp a row
  float* scratch;

  __device__ float operator()(float value) const { return alone ? warp_sum(value) : block_sum(value, scratch); }
};

template <class T, int pack>
__device__ __forceinline__ void load_row(const T* row, int first, int width, Pack<T, pack> (&values)[kValues / pack]) {
#pragma unroll
  for (int i = 0; i < kValues / pack; ++i) values[i] = load<pack>(row + pack_in_row<pack>(first, i, width));
}

// Targets of mean 0 and unbiased variance 1. Sums run over differences from the patch's first value, so that flat
// patches come out flat.
template <int pack>
__device__ __forceinline__ void standardise(float origin, int width, int first, const RowSum& row_sum,
                                            float (&target)[kValues]) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    target[k] = first + pack_at<pack>(k / pack) < width ? target[k] - origin : 0;
    sum += target[k];
  }
  const float mean = row_sum(sum) / static_cast<float>(width);
#pragma unroll
  for (int k = 0; k < kValues; ++k) target[k] -= mean;
  float squares, epsilon = 1e-6f;
#pragma unroll 1
  while (true) {
    squares = 0;
#pragma unroll
    for (int k = 0; k < kValues; ++k)
      if (first + pack_at<pack>(k / pack) < width) squares += target[k] * target[k];
    squares = row_sum(squares);
    if (!isinf(squares) || epsilon == 0) break;
    epsilon = 0;  // once more, smaller: beside such a variance it is nothing
#pragma unroll
    for (int k = 0; k < kValues; ++k) target[k] *= 0x1p-80f;
  }
  const float scale = 1 / sqrtf(squares / static_cast<float>(width - 1) + epsilon);
#pragma unroll
  for (int k = 0; k < kValues; ++k) target[k] *= scale;
}

// The mean of a row's squared errors, times the row's weight; rows of no image have none. A warp holds a part of the
// row, from `first` on.
template <class Pred, int pack>
__device__ __forceinline__ double row_loss(const MaskedMse& a, const PatchTables& t, Reduction reduction, int64_t row,
                                           int first, const RowSum& row_sum) {
  Pack<Pred, pack> pred[kValues / pack];
  const int64_t at = row * t.width;
  constexpr bool early = sizeof(pred[0]) == 16;  // while pixels are read, where there are registers for both
  if (early) load_row(as<Pred>(a.pred) + at, first, t.width, pred);
  const int id = a.ids_mask[row], image = sequence_of(a.cu_mask, a.images, row);
  const bool named = image < a.images;
  float target[kValues] = {}, squares = 0;
  if (named) {
    read_patch<pack>(a.source, t, image, id, first, target);
    if (a.norm_pix) standardise<pack>(first_value(a.source, t, image, id), t.width, first, row_sum, target);
  }
  if (!early) load_row(as<Pred>(a.pred) + at, first, t.width, pred);
#pragma unroll
  for (int i = 0; i < kValues / pack; ++i) {
    if (first + pack_at<pack>(i) >= t.width) continue;
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      const float error = named ? widen(pred[i].at[j]) - target[i * pack + j] : 0;
      squares += error * error;
      narrow(error, pred[i].at[j]);
    }
    if (a.error) store(as<Pred>(a.error) + at + first + pack_at<pack>(i), pred[i]);
  }
  squares = row_sum(squares);
  return named ? static_cast<double>(squares) / t.width * row_weight(reduction, a.cu_mask, a.images, image) : 0;
}

template <class Pred, int pack>
__global__ void __launch_bounds__(pack == kPack ? kThreads : kMostWarps* kWarp, 1)
    masked_mse_kernel(const __grid_constant__ MaskedMse a, const __grid_constant__ PatchTables t, int rows,
                      Reduction reduction, float* losses, double* partials, unsigned* counter) {
  __shared__ float scratch[kMostWarps];
  __shared__ double weighted[kMostWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const bool alone = t.width <= kWarpValues, leads = threadIdx.x % kWarp == 0 && (alone || warp == 0);
  const int row_warps = alone ? 1 : warps, at_a_time = static_cast<int>(gridDim.x) * (warps / row_warps);
  if (threadIdx.x % kWarp == 0) weighted[warp] = 0;
#pragma unroll 1
  for (int row = (static_cast<int>(blockIdx.x) * warps + warp) / row_warps; row < rows; row += at_a_time) {
    const int first = here(alone ? 0 : warp * kWarpValues);
    const double loss = row_loss<Pred, pack>(a, t, reduction, row, first, RowSum{alone, scratch});
    if (leads && reduction == Reduction::none) losses[row] = static_cast<float>(loss);
    if (leads) weighted[warp] += loss;
    __syncwarp();  // lanes may still read the row's pixels in shared memory
  }
  if (reduction == Reduction::none) return;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < warps; ++i) sum += weighted[i];
    partials[blockIdx.x] = sum;
  }
  if (!last_of(gridDim.x, counter)) return;
  const unsigned mine = (gridDim.x + blockDim.x - 1 - threadIdx.x) / blockDim.x;
  sum = block_sum(sum_of<1>(partials + threadIdx.x, blockDim.x, mine).at[0], weighted);
  if (threadIdx.x == 0) *losses = static_cast<float>(sum);
}

// dpred = error * 2 / width * (weight of the row) * dloss. Of rows of no image the error is 0, but dloss may be NaN.
template <class Pred, int pack>
__global__ void __launch_bounds__(kRows* kWarp)
    masked_mse_backward_kernel(const Pred* error, const float* dloss, const int32_t* cu, int64_t images, Pred* dpred,
                               int64_t rows, int width, Reduction reduction) {
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int first = static_cast<int>(blockIdx.y) * kWarpValues;
  const int64_t at = row * width;
  Pack<Pred, pack> values[kValues / pack];
  load_row(error + at, first, width, values);
  const int image = sequence_of(cu, images, row);
  float factor = 0;
  if (image < images)
    factor = static_cast<float>(row_weight(reduction, cu, images, image) * 2 / width *
                                dloss[reduction == Reduction::none ? row : 0]);
#pragma unroll
  for (int i = 0; i < kValues / pack; ++i) {
    if (first + pack_at<pack>(i) >= width) continue;
#pragma unroll
    for (int j = 0; j < pack; ++j) narrow(widen(values[i].at[j]) * factor, values[i].at[j]);
    store(dpred + at + first + pack_at<pack>(i), values[i]);
  }
}

// partials: at least one and one a row are enough for one a block. Not taken, as the counter, for the reduction "none".
void forward(const Tensor& pred, const Tensor& images, const Tensor& ids_mask, const Tensor& cu_mask,
             int64_t patch_size, bool norm_pix, const std::vector<double>& scale, const std::vector<double>& shift,
             const std::string& reduction_name, const Tensor& partials, Address counter, const Tensor& loss,
             const Tensor& error) {
  const int64_t rows = pred.size(0), samples = images.size(0);
  const PatchTables tables = patch_tables(images.size(1), patch_size, scale, shift);
  const int row_warps = (tables.width + kWarpValues - 1) / kWarpValues;
  M3AE_CHECK(row_warps <= kMostWarps, "patch_size must leave at most ", kMostWarps * kWarpValues,
             " values in a patch for impl='cuda', got ", patch_size, ", which makes ", tables.width);
  const MaskedMse args{read_in_packs(patch_source(images, patch_size)), ids_mask.int32s("ids_mask", {rows}),
                       cu_mask.int32s("cu_mask", {samples + 1}), pred.dense("pred", {rows, tables.width}),
                       error.optional("error", {rows, tables.width}, pred.dtype()), nullptr, samples, pred.dtype(),
                       norm_pix};
  M3AE_CHECK(rows < int64_t{1} << 30, "pred must have fewer than 2^30 rows for impl='cuda', got ", rows);
  const Reduction reduction = reduction_of(reduction_name);
  const bool each = reduction == Reduction::none;
  float* out = as<float>(each ? loss.dense("loss", {rows}, Dtype::f32) : loss.dense("loss", {}, Dtype::f32));
  double* sums = as<double>(partials.optional("partials", {std::max<int64_t>(rows, 1)}, Dtype::f64));
  const int warps = row_warps == 1 ? kRows : row_warps;
  const int64_t blocks = std::clamp<int64_t>(row_warps == 1 ? (rows + kRows - 1) / kRows : rows, 1, kMostBlocks);
  const bool packs = rows_in_packs(args.pred, tables.width) && rows_in_packs(args.error, tables.width);
  with_float(args.pred_dtype, [&](auto type) {
    using Pred = typename decltype(type)::type;
    launch("masked_mse_kernel", packs ? masked_mse_kernel<Pred, kPack> : masked_mse_kernel<Pred, 1>, grid(blocks),
           warps * kWarp, staging(args.source, packs, warps), stream_of(pred), args, tables, static_cast<int>(rows), reduction,
           out, sums, reinterpret_cast<unsigned*>(counter));
  });
}

void backward(const Tensor& dloss, const Tensor& error, const Tensor& cu_mask, const std::string& reduction_name,
              const Tensor& dpred) {
  const Reduction reduction = reduction_of(reduction_name);
  const int64_t rows = error.size(0), width = error.size(1), images = cu_mask.size(0) - 1;
  const void* from = error.dense("error", {rows, width});
  void* to = dpred.dense("dpred", {rows, width}, error.dtype());
  const int32_t* cu = cu_mask.int32s("cu_mask", {images + 1});
  const bool each = reduction == Reduction::none;
  const void* dlosses = each ? dloss.dense("dloss", {rows}, Dtype::f32) : dloss.dense("dloss", {}, Dtype::f32);
  const bool packs = rows_in_packs(from, width) && rows_in_packs(to, width);
  dim3 blocks = grid((rows + kRows - 1) / kRows);
  blocks.y = static_cast<unsigned>((width + kWarpValues - 1) / kWarpValues);
  with_float(error.dtype(), [&](auto type) {
    using Pred = typename decltype(type)::type;
    launch("masked_mse_backward_kernel",
           packs ? masked_mse_backward_kernel<Pred, kPackOf<Pred>> : masked_mse_backward_kernel<Pred, 1>, blocks,
           kRows * kWarp, 0, stream_of(error), as<Pred>(from), as<float>(dlosses), cu, images, as<Pred>(to), rows,
           static_cast<int>(width), reduction);
  });
}

}  // namespace

void bind_masked_mse(pybind11::module_& module) {
  bind(module, "masked_mse", forward, {"pred", "images", "ids_mask", "cu_mask", "patch_size", "norm_pix", "scale",
       "shift", "reduction", "partials", "counter", "loss", "error"});
  bind(module, "masked_mse_backward", backward, {"dloss", "error", "cu_mask", "reduction", "dpred"});
}

}  // namespace m3ae::cuda
