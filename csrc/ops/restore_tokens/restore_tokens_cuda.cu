// restore_tokens on a GPU: a warp an output row; backward, kept rows are written back and sums made in one pass.
#include "cuda/bind.h"
#include "cuda/token_rows.cuh"
#include "ops/restore_tokens/arguments.h"

namespace m3ae::cuda {
namespace {

template <int N>
__global__ void __launch_bounds__(kRowThreads, 5) restore_tokens_kernel(RestoreTokens a, int64_t count) {
  const int64_t t = int64_t{blockIdx.x} * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (t >= count) return;
  const int32_t row = a.rows[t], slot = a.slots[t];
  TokenRow parts{nullptr, 0, a.out_dtype, nullptr, 0, nullptr};
  if (slot >= a.patches) {
    parts = {a.text_mask_token, 0, a.out_dtype, a.text_position, (slot - a.patches) * a.width, a.text_type};
  } else if (slot >= 0) {
    parts = {a.image_mask_token, 0, a.out_dtype, a.image_position, slot * a.width, a.image_type};
  }
  if (row >= 0) {
    parts.source = a.kept;
    parts.source_at = row * a.width;
    parts.source_dtype = a.kept_dtype;
  }
  write_row<N>(a.out, t * a.width, a.out_dtype, parts, static_cast<int>(a.width));
}

// Kept rows go back to dkept; the others join a sum: by modality (image, text), then by masked or kept.
struct Restored {
  const int32_t *rows, *slots;
  int32_t patches;
  Target dkept;

  __device__ Move of(int64_t t) const {
    const int row = rows[t], slot = slots[t];
    return {slot < 0 ? -1 : 2 * (slot >= patches) + (row >= 0), row, false};
  }
  __device__ Target target(int) const { return dkept; }
};

template <int N>
__global__ void __launch_bounds__(kMoveThreads, 2) restore_tokens_backward_kernel(MoveRows a, Restored restored) {
  move_rows<4, N>(a, restored);
}

template <int N>
__global__ void __launch_bounds__(kGroupThreads, 6) restore_tokens_position_kernel(Groups a) {
  sum_group<N>(a, [](int64_t t) { return t; });
}

void forward(const Tensor& kept, const Tensor& rows, const Tensor& slots, const Tensor& image_mask_token,
             const Tensor& text_mask_token, const Tensor& image_position, const Tensor& text_position,
             const Tensor& image_type, const Tensor& text_type, const Tensor& out) {
  const RestoreTokens a = restore_tokens_arguments(kept, rows, slots, image_mask_token, text_mask_token, image_position,
                                                   text_position, image_type, text_type, out);
  const int64_t count = out.size(0);
  const int64_t warps = kRowThreads / kWarp;
  with_columns(a.width,
               {{a.kept, a.kept_dtype},
                {a.image_mask_token, a.out_dtype},
                {a.text_mask_token, a.out_dtype},
                {a.image_position, a.out_dtype},
                {a.text_position, a.out_dtype},
                {a.image_type, a.out_dtype},
                {a.text_type, a.out_dtype},
                {a.out, a.out_dtype}},
               [&](auto columns) {
                 M3AE_LAUNCH(restore_tokens_kernel<decltype(columns)::value>, grid((count + warps - 1) / warps),
                             kRowThreads, 0, stream_of(out), a, count);
               });
}

// dkept holds zeros: only the rows that are named are written. dsums: [2][2][width], the sum of `number` partials of
// that shape, at least one.
void backward(const Tensor& dout, const Tensor& rows, const Tensor& slots, int64_t patches, const Tensor& partials,
              Address counters, int64_t number, const Tensor& dkept, const Tensor& dsums) {
  const int64_t count = dout.size(0), width = dout.size(1);
  const MoveRows a{dout.dense("dout", {count, width}),
                   partials_of(partials.optional("partials", {number, 2, 2, width}, Dtype::f32),
                               dsums.optional("dsums", {2, 2, width}, Dtype::f32), counters),
                   count, (count + number - 1) / number, static_cast<int>(width), dout.dtype()};
  const Restored restored{rows.int32s("rows", {count}), slots.int32s("slots", {count}), static_cast<int32_t>(patches),
                          {dkept.optional("dkept", {kAny, width}), dkept.dtype()}};
  with_columns(width, {{a.dout, a.dtype}, {restored.dkept.rows, restored.dkept.dtype}}, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    M3AE_LAUNCH(restore_tokens_backward_kernel<N>, dim3(tiles(width, N), grid(number).x), kMoveThreads, 0,
                stream_of(dout), a, restored);
  });
}

// One table's gradient: see Groups.
void backward_position(const Tensor& dout, const Tensor& order, const Tensor& starts, const Tensor& dposition) {
  const int64_t groups = dposition.size(0), width = dout.size(1);
  const Groups a{dout.dense("dout", {kAny, width}), order.integers<int64_t>("order", {dout.size(0)}),
                 starts.int32s("starts", {kAny}), dposition.dense("dposition", {groups, width}, dout.dtype()), groups,
                 static_cast<int>(width), dout.dtype(), dout.dtype()};
  with_columns(width, {{a.dout, a.dtype}, {a.out, a.out_dtype}}, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    M3AE_LAUNCH(restore_tokens_position_kernel<N>, dim3(grid(groups).x, tiles(width, N)), kGroupThreads, 0,
                stream_of(dout), a);
  });
}

}  // namespace

void bind_restore_tokens(pybind11::module_& module) {
  bind(module, "restore_tokens", forward, {"kept", "rows", "slots", "image_mask_token", "text_mask_token",
       "image_position", "text_position", "image_type", "text_type", "out"});
  bind(module, "restore_tokens_backward", backward, {"dout", "rows", "slots", "patches", "partials", "counters",
       "number", "dkept", "dsums"});
  bind(module, "restore_tokens_backward_position", backward_position, {"dout", "order", "starts", "dposition"});
}

}  // namespace m3ae::cuda
