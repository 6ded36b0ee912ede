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

Packing packing_of(const Tensor& cu_image, const Tensor& cu_text, bool has_cls, int64_t image_rows) {
  const int64_t batch = (cu_image ? cu_image : cu_text).size(0) - 1;
  return {cu_image.optional_int32s("cu_image", {batch + 1}), cu_text.optional_int32s("cu_text", {batch + 1}),
          static_cast<int32_t>(batch), has_cls, static_cast<int32_t>(image_rows)};
}

void forward(const Tensor& image_tokens, const Tensor& text_tokens, const Tensor& image_ids, const Tensor& text_ids,
             const Tensor& cu_image, const Tensor& cu_text, const Tensor& cls_token, const Tensor& text_embedding,
             const Tensor& image_position, const Tensor& text_position, const Tensor& image_type,
             const Tensor& text_type, const Tensor& out) {
  const int64_t count = out.size(0), width = out.size(1), images = image_tokens.size(0), texts = text_tokens.size(0);
  const Dtype dtype = out.dtype();
  const Tensor& text = text_embedding ? text_embedding : text_tokens;
  const AssembleTokens a{packing_of(cu_image, cu_text, static_cast<bool>(cls_token), images),
                         {image_tokens.dense("image_tokens", {images, width}), nullptr,
                          image_ids.optional_int32s("image_ids", {images}),
                          image_position.optional("image_position", {kAny, width}, dtype),
                          image_type.optional("image_type", {width}, dtype), image_tokens.dtype()},
                         {text.dense(text_embedding ? "text_embedding" : "text_tokens", {kAny, width}),
                          text_embedding ? text_tokens.int32s("text_tokens", {texts}) : nullptr,
                          text_ids.optional_int32s("text_ids", {texts}),
                          text_position.optional("text_position", {kAny, width}, dtype),
                          text_type.optional("text_type", {width}, dtype), text.dtype()},
                         cls_token.optional("cls_token", {width}, dtype), out.dense("out", {count, width}), count,
                         width, dtype};
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
                             kRowThreads, 0, stream_of(out), a);
               });
}

// dparts: [3][width], class tokens, image rows and text rows, the sum of `number` partials of that shape, at least one.
void backward(const Tensor& dout, const Tensor& cu_image, const Tensor& cu_text, bool has_cls, int64_t image_rows,
              const Tensor& partials, Address counters, int64_t number, const Tensor& dimage, const Tensor& dtext,
              const Tensor& dparts) {
  const int64_t count = dout.size(0), width = dout.size(1);
  const MoveRows a{dout.dense("dout", {count, width}),
                   partials_of(partials.optional("partials", {number, 3, width}, Dtype::f32),
                               dparts.optional("dparts", {3, width}, Dtype::f32), counters),
                   count, (count + number - 1) / number, static_cast<int>(width), dout.dtype()};
  const Assembled assembled{packing_of(cu_image, cu_text, has_cls, image_rows),
                            {dimage.optional("dimage", {image_rows, width}), dimage.dtype()},
                            {dtext.optional("dtext", {kAny, width}), dtext.dtype()}};
  const auto rows_of = [](const Target& target) { return Rows{target.rows, target.dtype}; };
  with_columns(width, {{a.dout, a.dtype}, rows_of(assembled.image), rows_of(assembled.text)}, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    M3AE_LAUNCH(assemble_tokens_backward_kernel<N>, dim3(tiles(width, N), grid(number).x), kMoveThreads, 0,
                stream_of(dout), a, assembled);
  });
}

// One table's gradient: see Groups. images: its rows were read for image tokens, else for text tokens.
void backward_table(const Tensor& dout, const Tensor& order, const Tensor& starts, const Tensor& cu_image,
                    const Tensor& cu_text, bool has_cls, bool images, const Tensor& dtable) {
  const int64_t groups = dtable.size(0), width = dout.size(1);
  const Groups a{dout.dense("dout", {kAny, width}), order.integers<int64_t>("order", {kAny}),
                 starts.int32s("starts", {groups + 1}), dtable.dense("dtable", {groups, width}), groups,
                 static_cast<int>(width), dout.dtype(), dtable.dtype()};
  const Packing packing = packing_of(cu_image, cu_text, has_cls, 0);
  with_columns(width, {{a.dout, a.dtype}, {a.out, a.out_dtype}}, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    M3AE_LAUNCH(assemble_tokens_table_kernel<N>, dim3(grid(groups).x, tiles(width, N)), kGroupThreads, 0,
                stream_of(dout), a, packing, images ? kImage : kText);
  });
}

}  // namespace

void bind_assemble_tokens(pybind11::module_& module) {
  bind(module, "assemble_tokens", forward, {"image_tokens", "text_tokens", "image_ids", "text_ids", "cu_image",
       "cu_text", "cls_token", "text_embedding", "image_position", "text_position", "image_type", "text_type", "out"});
  bind(module, "assemble_tokens_backward", backward, {"dout", "cu_image", "cu_text", "has_cls", "image_rows",
       "partials", "counters", "number", "dimage", "dtext", "dparts"});
  bind(module, "assemble_tokens_backward_table", backward_table, {"dout", "order", "starts", "cu_image", "cu_text",
       "has_cls", "images", "dtable"});
}

}  // namespace m3ae::cuda
