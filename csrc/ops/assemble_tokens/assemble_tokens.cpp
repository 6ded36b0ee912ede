#include "ops/assemble_tokens/assemble_tokens.h"

#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/pages.h"
#include "cpu/reduce_rows.h"
#include "cpu/sum_rows.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

void check_cu(const char* name, const int32_t* cu, int64_t batch, int64_t rows) {
  if (!cu) return;
  M3AE_CHECK(cu[0] == 0, name, " must start at 0, got ", cu[0]);
  for (int64_t b = 0; b < batch; ++b)
    M3AE_CHECK(cu[b] <= cu[b + 1], name, " must not decrease, got ", cu[b + 1], " after ", cu[b], " at sequence ", b);
  M3AE_CHECK(cu[batch] <= rows, name, " must end at or before the ", rows, " rows it divides, got ", cu[batch]);
}

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

const char* row_of(Address rows, int64_t row, int64_t width, Dtype dtype) {
  return as<char>(pointer(rows)) + row * width * size_of(dtype);
}

// vocabulary, patches, words: rows of their tables, -1 without a table.
void forward(Address image_tokens, Address text_tokens, Address image_ids, Address text_ids, Address cu_image,
             Address cu_text, Address cls_token, Address text_embedding, Address image_position, Address text_position,
             Address image_type, Address text_type, Address out, int64_t batch, int64_t count, int64_t image_rows,
             int64_t text_rows, int64_t vocabulary, int64_t patches, int64_t words, int64_t width, int image_dtype,
             int text_dtype, int out_dtype) {
  const Dtype image_code = Dtype(image_dtype), text_code = Dtype(text_dtype), dtype = Dtype(out_dtype);
  check_cu("cu_image", int32s(cu_image), batch, image_rows);
  check_cu("cu_text", int32s(cu_text), batch, text_rows);
  std::vector<AssembledRow> rows(static_cast<size_t>(count));  // zeroed: rows past the last sequence stay so
  const auto place = [&](const int32_t* ids, const char* name, const char* table_name, Address table, int64_t k,
                         int64_t table_rows) -> const void* {
    if (table_rows < 0) return nullptr;
    check_id(name, table_name, ids[k], k, table_rows);
    return row_of(table, ids[k], width, dtype);
  };
  for_each_row(
      int32s(cu_image), int32s(cu_text), batch, cls_token != 0,
      [&](int64_t t) { rows[static_cast<size_t>(t)] = {pointer(cls_token), nullptr, nullptr, dtype == Dtype::bf16}; },
      [&](int64_t t, int64_t k) {
        rows[static_cast<size_t>(t)] = {
            row_of(image_tokens, k, width, image_code),
            place(int32s(image_ids), "image_ids", "image_position", image_position, k, patches), pointer(image_type),
            image_code == Dtype::bf16};
      },
      [&](int64_t t, int64_t k) {
        int64_t row = k;
        if (vocabulary >= 0) {
          row = int32s(text_tokens)[k];
          check_id("text_tokens", "text_embedding", int32s(text_tokens)[k], k, vocabulary);
        }
        rows[static_cast<size_t>(t)] = {row_of(vocabulary >= 0 ? text_embedding : text_tokens, row, width, text_code),
                                        place(int32s(text_ids), "text_ids", "text_position", text_position, k, words),
                                        pointer(text_type), text_code == Dtype::bf16};
      });
  prefer_huge_pages(pointer(out), count * width * size_of(dtype));
  const AssembleTokens args{rows.data(), pointer(out), width, dtype};
  const auto kernel = M3AE_DISPATCH(assemble_tokens);
  parallel_for(count, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The gradient of a table: the sum of dout's rows by the row of the table they were read from.
struct Lookup {
  Address ids, dtable;
  int64_t table_rows;
  int dtype;
  std::vector<int32_t> index = {};  // [T], -1 where no row of the table was read
};

void zero_tail(Address rows, const int32_t* cu, int64_t batch, int64_t count, int64_t width, Dtype dtype) {
  if (!rows || !cu) return;
  const int64_t row_bytes = width * size_of(dtype);
  std::memset(as<char>(pointer(rows)) + cu[batch] * row_bytes, 0, static_cast<size_t>((count - cu[batch]) * row_bytes));
}

// Indices were checked by forward. A null gradient is not wanted; dparts is [3, width] accumulators: class tokens,
// image rows, text rows.
void backward(Address dout, Address text_tokens, Address image_ids, Address text_ids, Address cu_image, Address cu_text,
              Address dimage, Address dtext, Address dparts, Address dembedding, Address dimage_position,
              Address dtext_position, int64_t batch, int64_t count, int64_t image_rows, int64_t text_rows,
              int64_t vocabulary, int64_t patches, int64_t words, int64_t width, bool has_cls, int image_dtype,
              int text_dtype, int embedding_dtype, int out_dtype) {
  const Dtype image_code = Dtype(image_dtype), text_code = Dtype(text_dtype), dtype = Dtype(out_dtype);
  Lookup embedding{text_tokens, dembedding, vocabulary, embedding_dtype};
  Lookup image_position{image_ids, dimage_position, patches, out_dtype};
  Lookup text_position{text_ids, dtext_position, words, out_dtype};
  for (Lookup* each : {&embedding, &image_position, &text_position})
    if (each->dtable) each->index.assign(static_cast<size_t>(count), -1);
  const auto note = [](Lookup& lookup, int64_t t, int64_t k) {
    if (lookup.dtable) lookup.index[static_cast<size_t>(t)] = int32s(lookup.ids)[k];
  };
  const auto target = [&](Address rows, int64_t k, Dtype code) {
    return rows ? as<char>(pointer(rows)) + k * width * size_of(code) : nullptr;
  };
  std::vector<DisassembledRow> rows(static_cast<size_t>(count), {nullptr, -1, false});
  for_each_row(
      int32s(cu_image), int32s(cu_text), batch, has_cls,
      [&](int64_t t) { rows[static_cast<size_t>(t)].part = 0; },
      [&](int64_t t, int64_t k) {
        rows[static_cast<size_t>(t)] = {target(dimage, k, image_code), 1, image_code == Dtype::bf16};
        note(image_position, t, k);
      },
      [&](int64_t t, int64_t k) {
        rows[static_cast<size_t>(t)] = {target(dtext, k, text_code), 2, text_code == Dtype::bf16};
        note(embedding, t, k);
        note(text_position, t, k);
      });
  zero_tail(dimage, int32s(cu_image), batch, image_rows, width, image_code);
  zero_tail(dtext, int32s(cu_text), batch, text_rows, width, text_code);
  if (dimage || dtext || dparts) {
    const AssembleTokensBackward args{rows.data(), pointer(dout), width, dtype};
    const auto kernel = M3AE_DISPATCH(assemble_tokens_backward);
    reduce_rows(count, 3 * width, dtype, pointer(dparts),
                [&](int64_t begin, int64_t end, void* partial) { kernel(args, begin, end, partial); });
  }
  for (const Lookup* each : {&embedding, &image_position, &text_position})
    if (each->dtable)
      sum_rows(pointer(dout), dtype, each->index.data(), count, 0, each->table_rows, width, pointer(each->dtable),
               Dtype(each->dtype));
}

}  // namespace

void bind_assemble_tokens(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("assemble_tokens", &forward, no_gil);
  module.def("assemble_tokens_backward", &backward, no_gil);
}

}  // namespace m3ae
