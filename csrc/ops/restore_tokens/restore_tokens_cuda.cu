// restore_tokens on a GPU: a warp an output row; backward, kept rows are written back and sums made in one pass.
#include "ops/restore_tokens/restore_tokens.h"

#include "cuda/bind.h"
#include "cuda/token_rows.cuh"

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

void forward(Address kept, Address rows, Address slots, Address image_mask_token, Address text_mask_token,
             Address image_position, Address text_position, Address image_type, Address text_type, Address out,
             int64_t count, int64_t width, int64_t patches, int kept_dtype, int out_dtype, int device, Address on) {
  const RestoreTokens a{pointer(kept),            int32s(rows),
                        int32s(slots),            pointer(image_mask_token),
                        pointer(text_mask_token), pointer(image_position),
                        pointer(text_position),   pointer(image_type),
                        pointer(text_type),       pointer(out),
                        width,                    static_cast<int32_t>(patches),
                        Dtype(kept_dtype),        Dtype(out_dtype)};
  const int64_t warps = kRowThreads / kWarp;
  with_columns(width,
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
                             kRowThreads, 0, Stream{device, on}, a, count);
               });
}

// dkept holds zeros: only the rows that are named are written; null: not wanted. dsums: [2][2][width], the sum of
// `chunks` partials of that shape, at least one; null, both: not wanted.
void backward(Address dout, Address rows, Address slots, Address dkept, Address partials, Address dsums,
              Address tickets, int64_t chunks, int64_t count, int64_t width, int64_t patches, int kept_dtype,
              int out_dtype, int device, Address on) {
  const MoveRows a{pointer(dout),
                   partials_of(partials, dsums, tickets),
                   count,
                   (count + chunks - 1) / chunks,
                   static_cast<int>(width),
                   Dtype(out_dtype)};
  const Restored restored{int32s(rows), int32s(slots), static_cast<int32_t>(patches),
                          {pointer(dkept), Dtype(kept_dtype)}};
  with_columns(width, {{a.dout, a.dtype}, {restored.dkept.rows, restored.dkept.dtype}}, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    M3AE_LAUNCH(restore_tokens_backward_kernel<N>, dim3(tiles(width, N), grid(chunks).x), kMoveThreads, 0,
                Stream{device, on}, a, restored);
  });
}

// One table's gradient: see Groups.
void backward_position(Address dout, Address order, Address starts, Address dposition, int64_t groups, int64_t width,
                       int dtype, int device, Address on) {
  const Groups a{pointer(dout), as<int64_t>(pointer(order)), int32s(starts), pointer(dposition), groups,
                 static_cast<int>(width), Dtype(dtype), Dtype(dtype)};
  with_columns(width, {{a.dout, a.dtype}, {a.out, a.out_dtype}}, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    M3AE_LAUNCH(restore_tokens_position_kernel<N>, dim3(grid(groups).x, tiles(width, N)), kGroupThreads, 0,
                Stream{device, on}, a);
  });
}

}  // namespace

void bind_restore_tokens(pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  module.def("restore_tokens", &forward, no_gil);
  module.def("restore_tokens_backward", &backward, no_gil);
  module.def("restore_tokens_backward_position", &backward_position, no_gil);
}

}  // namespace m3ae::cuda
