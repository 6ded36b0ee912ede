// assemble_tokens on a GPU: a warp an output row, which finds the token that stands there in the offsets; backward,
// rows are moved back and summed in one pass, tables' gradients by groups of the tokens that read the same row.
#include "cuda/bind.h"
#include "cuda/token_rows.cuh"

namespace m3ae::cuda {
namespace {

enum Part : int { kCls = 0, kImage = 1, kText = 2 };

// Which token stands where. Rows past the last sample are those of the tokens that belong to none.
struct Packing {
  const int32_t *cu_image, *cu_text;  // [batch + 1]; null: no such tokens
  int32_t batch, has_cls, image_rows;

  struct Place {
    Part part;
    int token;
    bool inside;  // a sample
  };

  __device__ int image(int b) const { return cu_image ? cu_image[b] : 0; }
  __device__ int text(int b) const { return cu_text ? cu_text[b] : 0; }
  __device__ int64_t start(int b) const { return int64_t{b} * has_cls + image(b) + text(b); }

  // The first sample whose end(sample) is past `place`; batch: none.
  template <class End>
  __device__ int sample_of(int64_t place, const End& end) const {
    int low = 0, high = batch;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (end(middle) <= place) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  __device__ Place at(int64_t t) const {
    const int sample = sample_of(t, [&](int each) { return start(each + 1); });
    const bool inside = sample < batch;
    const int offset = static_cast<int>(t - start(sample)) - (inside ? has_cls : 0);
    const int images = (inside ? image(sample + 1) : image_rows) - image(sample);
    if (offset < 0) return {kCls, 0, inside};
    if (offset < images) return {kImage, image(sample) + offset, inside};
    return {kText, text(sample) + offset - images, inside};
  }

  // The row where an image or a text token stands; -1: in no sample.
  __device__ int64_t row_of(Part part, int64_t token) const {
    const int32_t* cu = part == kImage ? cu_image : cu_text;
    const int sample = sample_of(token, [&](int each) { return cu[each + 1]; });
    if (sample == batch) return -1;
    return (sample + int64_t{1}) * has_cls + token + (part == kImage ? text(sample) : image(sample + 1));
  }
};

struct Modality {
  const void* rows;      // tokens, or the table that they are looked up in
  const int32_t* words;  // the row of the table for each token; null: its own
  const int32_t* ids;    // the row of `position` for each token
  const void* position;  // null: none
  const void* type;      // null: none
  Dtype dtype;           // of rows
};

struct AssembleTokens {
  Packing packing;
  Modality image, text;
  const void* cls_token;
  void* out;
  int64_t count, width;
  Dtype dtype;
};

template <int N>
__global__ void __launch_bounds__(kRowThreads, 5) assemble_tokens_kernel(AssembleTokens a) {
  const int64_t t = int64_t{blockIdx.x} * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (t >= a.count) return;
  const Packing::Place place = a.packing.at(t);
  TokenRow parts{nullptr, 0, a.dtype, nullptr, 0, nullptr};
  const auto from = [&](const Modality& m) {
    const int64_t row = m.words ? m.words[place.token] : place.token;
    parts = {m.rows, row * a.width, m.dtype, m.position, m.position ? m.ids[place.token] * a.width : 0, m.type};
  };
  if (place.inside) {
    if (place.part == kCls) parts.source = a.cls_token;
    else if (place.part == kImage) from(a.image);
    else from(a.text);
  }
  write_row<N>(a.out, t * a.width, a.dtype, parts, static_cast<int>(a.width));
}

struct Assembled {
  Packing packing;
  Target image, text;

  __device__ Move of(int64_t t) const {
    const Packing::Place place = packing.at(t);
    return {place.part, place.part == kCls ? -1 : place.token, !place.inside};
  }
  __device__ Target target(int part) const {
    return {part == kImage ? image.rows : text.rows, part == kImage ? image.dtype : text.dtype};
  }
};

template <int N>
__global__ void __launch_bounds__(kMoveThreads, 2) assemble_tokens_backward_kernel(MoveRows a, Assembled assembled) {
  move_rows<3, N>(a, assembled);
}

template <int N>
__global__ void __launch_bounds__(kGroupThreads, 6) assemble_tokens_table_kernel(Groups a, Packing packing, Part part) {
  sum_group<N>(a, [&](int64_t token) { return packing.row_of(part, token); });
}

Packing packing_of(Address cu_image, Address cu_text, int64_t batch, bool has_cls, int64_t image_rows) {
  return {int32s(cu_image), int32s(cu_text), static_cast<int32_t>(batch), has_cls, static_cast<int32_t>(image_rows)};
}

// text_rows: the text tokens, or the table that `words` are looked up in.
void forward(Address image_tokens, Address text_rows, Address words, Address image_ids, Address text_ids,
             Address cu_image, Address cu_text, Address cls_token, Address image_position, Address text_position,
             Address image_type, Address text_type, Address out, int64_t batch, int64_t count, int64_t image_rows,
             int64_t width, int image_dtype, int text_dtype, int dtype, int device, Address on) {
  const AssembleTokens a{packing_of(cu_image, cu_text, batch, cls_token != 0, image_rows),
                         {pointer(image_tokens), nullptr, int32s(image_ids), pointer(image_position),
                          pointer(image_type), Dtype(image_dtype)},
                         {pointer(text_rows), int32s(words), int32s(text_ids), pointer(text_position),
                          pointer(text_type), Dtype(text_dtype)},
                         pointer(cls_token),
                         pointer(out),
                         count,
                         width,
                         Dtype(dtype)};
  const int64_t warps = kRowThreads / kWarp;
  with_columns(width,
               {{a.image.rows, a.image.dtype},
                {a.image.position, a.dtype},
                {a.image.type, a.dtype},
                {a.text.rows, a.text.dtype},
                {a.text.position, a.dtype},
                {a.text.type, a.dtype},
                {a.cls_token, a.dtype},
                {a.out, a.dtype}},
               [&](auto columns) {
                 M3AE_LAUNCH(assemble_tokens_kernel<decltype(columns)::value>, grid((count + warps - 1) / warps),
                             kRowThreads, 0, Stream{device, on}, a);
               });
}

// A null gradient is not wanted. dparts: [3][width], class tokens, image rows and text rows, the sum of `chunks`
// partials of that shape, at least one.
void backward(Address dout, Address cu_image, Address cu_text, Address dimage, Address dtext, Address partials,
              Address dparts, Address tickets, int64_t chunks, int64_t batch, int64_t count, int64_t image_rows,
              int64_t width, bool has_cls, int image_dtype, int text_dtype, int dtype, int device, Address on) {
  const MoveRows a{pointer(dout),
                   partials_of(partials, dparts, tickets),
                   count,
                   (count + chunks - 1) / chunks,
                   static_cast<int>(width),
                   Dtype(dtype)};
  const Assembled assembled{packing_of(cu_image, cu_text, batch, has_cls, image_rows),
                            {pointer(dimage), Dtype(image_dtype)},
                            {pointer(dtext), Dtype(text_dtype)}};
  const auto rows_of = [](const Target& target) { return Rows{target.rows, target.dtype}; };
  with_columns(width, {{a.dout, a.dtype}, rows_of(assembled.image), rows_of(assembled.text)}, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    M3AE_LAUNCH(assemble_tokens_backward_kernel<N>, dim3(tiles(width, N), grid(chunks).x), kMoveThreads, 0,
                Stream{device, on}, a, assembled);
  });
}

// One table's gradient: see Groups. images: its rows were read for image tokens, else for text tokens.
void backward_table(Address dout, Address order, Address starts, Address dtable, Address cu_image, Address cu_text,
                    int64_t groups, int64_t batch, int64_t width, bool has_cls, bool images, int dtype, int table_dtype,
                    int device, Address on) {
  const Groups a{pointer(dout), as<int64_t>(pointer(order)), int32s(starts), pointer(dtable), groups,
                 static_cast<int>(width), Dtype(dtype), Dtype(table_dtype)};
  const Packing packing = packing_of(cu_image, cu_text, batch, has_cls, 0);
  with_columns(width, {{a.dout, a.dtype}, {a.out, a.out_dtype}}, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    M3AE_LAUNCH(assemble_tokens_table_kernel<N>, dim3(grid(groups).x, tiles(width, N)), kGroupThreads, 0,
                Stream{device, on}, a, packing, images ? kImage : kText);
  });
}

}  // namespace

void bind_assemble_tokens(pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  module.def("assemble_tokens", &forward, no_gil);
  module.def("assemble_tokens_backward", &backward, no_gil);
  module.def("assemble_tokens_backward_table", &backward_table, no_gil);
}

}  // namespace m3ae::cuda
