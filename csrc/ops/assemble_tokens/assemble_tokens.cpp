#include "ops/assemble_tokens/assemble_tokens.h"

#include <cstring>
#include <vector>

#include "cpu/pages.h"
#include "cpu/reduce_rows.h"
#include "cpu/sum_rows.h"
#include "cpu/threads.h"
#include "tensor.h"

namespace py = pybind11;

namespace m3ae {
namespace {

void check_id(const char* name, const char* table, int32_t id, int64_t at, int64_t rows) {
  M3AE_CHECK(id >= 0 && id < rows, name, " must name a row of ", table, ", which has ", rows, " rows, got ", name, "[",
             at, "] = ", id);
}

// The order of the output: cls(b), then image(k) for the sample's image rows, then text(k), each with its output row.
// Returns the number of rows that belong to a sample.
template <class Cls, class Image, class Text>
int64_t for_each_row(const int32_t* cu_image, const int32_t* cu_text, int64_t batch, bool has_cls, const Cls& cls,
                     const Image& image, const Text& text) {
  int64_t t = 0;
  for (int64_t b = 0; b < batch; ++b) {
    if (has_cls) cls(t++);
    if (cu_image)
      for (int64_t k = cu_image[b]; k < cu_image[b + 1]; ++k) image(t++, k);
    if (cu_text)
      for (int64_t k = cu_text[b]; k < cu_text[b + 1]; ++k) text(t++, k);
  }
  return t;
}

const char* row_of(const void* rows, int64_t row, int64_t width, Dtype dtype) {
  return as<char>(rows) + row * width * size_of(dtype);
}

// Of samples, and their offsets into image rows and text rows; either may be null.
struct Packing {
  const int32_t *cu_image, *cu_text;
  int64_t batch;
};

// They fit the rows of the parts, and these the rows of the whole.
Packing packing_of(const Tensor& cu_image, const Tensor& cu_text, int64_t images, int64_t texts, bool has_cls,
                   int64_t count) {
  const int64_t batch = sequences_of(cu_image ? "cu_image" : "cu_text", cu_image ? cu_image : cu_text);
  const Packing p{cu_image.optional_int32s("cu_image", {batch + 1}), cu_text.optional_int32s("cu_text", {batch + 1}),
                  batch};
  if (p.cu_image) check_offsets("cu_image", p.cu_image, batch, images);
  if (p.cu_text) check_offsets("cu_text", p.cu_text, batch, texts);
  const int64_t rows = (has_cls ? batch : 0) + (p.cu_image ? p.cu_image[batch] : 0) + (p.cu_text ? p.cu_text[batch] : 0);
  M3AE_CHECK(rows <= count, "the output must have at least ", rows, " rows, got ", count);
  return p;
}

void forward(const Tensor& image_tokens, const Tensor& text_tokens, const Tensor& image_ids, const Tensor& text_ids,
             const Tensor& cu_image, const Tensor& cu_text, const Tensor& cls_token, const Tensor& text_embedding,
             const Tensor& image_position, const Tensor& text_position, const Tensor& image_type,
             const Tensor& text_type, const Tensor& out) {
  const int64_t count = out.size(0), width = out.size(1), images = image_tokens.size(0), texts = text_tokens.size(0);
  const Dtype dtype = out.dtype();
  const Packing packing = packing_of(cu_image, cu_text, images, texts, static_cast<bool>(cls_token), count);
  const Tensor& text = text_embedding ? text_embedding : text_tokens;
  const void* image_rows = image_tokens.dense("image_tokens", {images, width});
  const void* text_rows = text.dense(text_embedding ? "text_embedding" : "text_tokens", {kAny, width});
  const int32_t* words = text_embedding ? text_tokens.int32s("text_tokens", {texts}) : nullptr;
  const int32_t* image_slots = image_ids.optional_int32s("image_ids", {images});
  const int32_t* text_slots = text_ids.optional_int32s("text_ids", {texts});
  const void* image_places = image_position.optional("image_position", {kAny, width}, dtype);
  const void* text_places = text_position.optional("text_position", {kAny, width}, dtype);
  M3AE_CHECK(!image_position || image_ids, "image_ids must be given with image_position, got None");
  M3AE_CHECK(!text_position || text_ids, "text_ids must be given with text_position, got None");
  const void* cls = cls_token.optional("cls_token", {width}, dtype);
  const void* of_images = image_type.optional("image_type", {width}, dtype);
  const void* of_texts = text_type.optional("text_type", {width}, dtype);
  std::vector<AssembledRow> rows(static_cast<size_t>(count));  // zeroed: rows past the last sequence stay so
  const auto place = [&](const int32_t* ids, const char* name, const char* table_name, const void* table,
                         const Tensor& position, int64_t k) -> const void* {
    if (!position) return nullptr;
    check_id(name, table_name, ids[k], k, position.size(0));
    return row_of(table, ids[k], width, dtype);
  };
  for_each_row(
      packing.cu_image, packing.cu_text, packing.batch, static_cast<bool>(cls_token),
      [&](int64_t t) { rows[static_cast<size_t>(t)] = {cls, nullptr, nullptr, dtype == Dtype::bf16}; },
      [&](int64_t t, int64_t k) {
        rows[static_cast<size_t>(t)] = {
            row_of(image_rows, k, width, image_tokens.dtype()),
            place(image_slots, "image_ids", "image_position", image_places, image_position, k), of_images,
            image_tokens.dtype() == Dtype::bf16};
      },
      [&](int64_t t, int64_t k) {
        if (words) check_id("text_tokens", "text_embedding", words[k], k, text_embedding.size(0));
        rows[static_cast<size_t>(t)] = {row_of(text_rows, words ? words[k] : k, width, text.dtype()),
                                        place(text_slots, "text_ids", "text_position", text_places, text_position, k),
                                        of_texts, text.dtype() == Dtype::bf16};
      });
  const AssembleTokens args{rows.data(), out.dense("out", {count, width}), width, dtype};
  prefer_huge_pages(args.out, count * width * size_of(dtype));
  const auto kernel = M3AE_DISPATCH(assemble_tokens);
  parallel_for(count, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The gradient of a table: the sum of dout's rows by the row of the table they were read from.
struct Lookup {
  Lookup(const char* ids_name, const char* table_name, const Tensor& table, const Tensor& of_rows, int64_t rows,
         int64_t count, int64_t width)
      : ids_name(ids_name), table_name(table_name), ids(table ? of_rows.int32s(ids_name, {rows}) : nullptr),
        dtable(table.optional(table_name, {kAny, width})), table_rows(table.size(0)), dtype(table.dtype()) {
    if (dtable) index.assign(static_cast<size_t>(count), -1);
  }
  void note(int64_t t, int64_t k) {
    if (!dtable) return;
    check_id(ids_name, table_name, ids[k], k, table_rows);
    index[static_cast<size_t>(t)] = ids[k];
  }

  const char *ids_name, *table_name;
  const int32_t* ids;
  void* dtable;
  int64_t table_rows;
  Dtype dtype;
  std::vector<int32_t> index;  // [T], -1 where no row of the table was read
};

// The gradient of rows of tokens, in the order in which they came in.
struct TokenRows {
  TokenRows(const char* name, const Tensor& rows, int64_t count, int64_t width)
      : data(rows.optional(name, {count, width})), count(count), row_bytes(width * size_of(rows.dtype())),
        bf16(rows.dtype() == Dtype::bf16) {}
  DisassembledRow at(int64_t k, int32_t part) const {
    return {data ? as<char>(data) + k * row_bytes : nullptr, part, bf16};
  }
  void zero_from(int64_t k) const {
    if (data) std::memset(as<char>(data) + k * row_bytes, 0, static_cast<size_t>((count - k) * row_bytes));
  }

  void* data;
  int64_t count, row_bytes;
  bool bf16;
};

// Indices are checked once more: they may have been written to since. dparts: [3, width], sums of class tokens, of image
// rows, of text rows.
void backward(const Tensor& dout, const Tensor& text_tokens, const Tensor& image_ids, const Tensor& text_ids,
              const Tensor& cu_image, const Tensor& cu_text, bool has_cls, int64_t images, int64_t texts,
              const Tensor& dimage, const Tensor& dtext, const Tensor& dparts, const Tensor& dembedding,
              const Tensor& dimage_position, const Tensor& dtext_position) {
  const int64_t count = dout.size(0), width = dout.size(1);
  const Dtype dtype = dout.dtype();
  const Packing packing = packing_of(cu_image, cu_text, images, texts, has_cls, count);
  const TokenRows image_rows("dimage", dimage, images, width), text_rows("dtext", dtext, texts, width);
  Lookup embedding("text_tokens", "dembedding", dembedding, text_tokens, texts, count, width);
  Lookup image_position("image_ids", "dimage_position", dimage_position, image_ids, images, count, width);
  Lookup text_position("text_ids", "dtext_position", dtext_position, text_ids, texts, count, width);
  std::vector<DisassembledRow> rows(static_cast<size_t>(count), {nullptr, -1, false});
  for_each_row(
      packing.cu_image, packing.cu_text, packing.batch, has_cls,
      [&](int64_t t) { rows[static_cast<size_t>(t)].part = 0; },
      [&](int64_t t, int64_t k) {
        rows[static_cast<size_t>(t)] = image_rows.at(k, 1);
        image_position.note(t, k);
      },
      [&](int64_t t, int64_t k) {
        rows[static_cast<size_t>(t)] = text_rows.at(k, 2);
        embedding.note(t, k);
        text_position.note(t, k);
      });
  if (packing.cu_image) image_rows.zero_from(packing.cu_image[packing.batch]);
  if (packing.cu_text) text_rows.zero_from(packing.cu_text[packing.batch]);
  const AssembleTokensBackward args{rows.data(), dout.dense("dout", {count, width}), width, dtype};
  if (dimage || dtext || dparts) {
    const auto kernel = M3AE_DISPATCH(assemble_tokens_backward);
    reduce_rows(count, 3 * width, dtype, dparts.optional("dparts", {3, width}, accumulator(dtype)),
                [&](int64_t begin, int64_t end, void* partial) { kernel(args, begin, end, partial); });
  }
  for (const Lookup* each : {&embedding, &image_position, &text_position})
    if (each->dtable)
      sum_rows(args.dout, dtype, each->index.data(), count, 0, each->table_rows, width, each->dtable, each->dtype);
}

}  // namespace

void bind_assemble_tokens(py::module_& module) {
  bind(module, "assemble_tokens", forward, {"image_tokens", "text_tokens", "image_ids", "text_ids", "cu_image",
       "cu_text", "cls_token", "text_embedding", "image_position", "text_position", "image_type", "text_type", "out"});
  bind(module, "assemble_tokens_backward", backward, {"dout", "text_tokens", "image_ids", "text_ids", "cu_image",
       "cu_text", "has_cls", "image_rows", "text_rows", "dimage", "dtext", "dparts", "dembedding",
       "dimage_position", "dtext_position"});
}

}  // namespace m3ae
