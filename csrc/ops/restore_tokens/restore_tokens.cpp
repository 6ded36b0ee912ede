#include "ops/restore_tokens/restore_tokens.h"

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

// Every index inside its table, every kept row named at most once (its gradient is written, not added).
void check_indices(const int32_t* rows, const int32_t* slots, int64_t count, int64_t kept_rows, int64_t table_rows) {
  std::vector<char> named(static_cast<size_t>(kept_rows), 0);
  for (int64_t t = 0; t < count; ++t) {
    M3AE_CHECK(rows[t] >= -1 && rows[t] < kept_rows, "rows must be -1 or name a row of kept, which has ", kept_rows,
               " rows, got rows[", t, "] = ", rows[t]);
    M3AE_CHECK(slots[t] >= -1 && slots[t] < table_rows,
               "slots must be -1 or name a row of [image_position; text_position], which has ", table_rows,
               " rows, got slots[", t, "] = ", slots[t]);
    if (rows[t] < 0) continue;
    M3AE_CHECK(!named[static_cast<size_t>(rows[t])], "rows must name a row of kept at most once, got ", rows[t],
               " again at rows[", t, "]");
    named[static_cast<size_t>(rows[t])] = 1;
  }
}

void forward(Address kept, Address rows, Address slots, Address image_mask_token, Address text_mask_token,
             Address image_position, Address text_position, Address image_type, Address text_type, Address out,
             int64_t count, int64_t kept_rows, int64_t width, int64_t patches, int64_t words, int kept_dtype,
             int out_dtype) {
  check_indices(int32s(rows), int32s(slots), count, kept_rows, patches + words);
  const RestoreTokens args{pointer(kept),           int32s(rows),
                           int32s(slots),           pointer(image_mask_token),
                           pointer(text_mask_token), pointer(image_position),
                           pointer(text_position),  pointer(image_type),
                           pointer(text_type),      pointer(out),
                           width,                   static_cast<int32_t>(patches),
                           Dtype(kept_dtype),       Dtype(out_dtype)};
  prefer_huge_pages(pointer(out), count * width * size_of(Dtype(out_dtype)));
  const auto kernel = M3AE_DISPATCH(restore_tokens);
  parallel_for(count, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Rows of dkept that no entry of `rows` names.
void zero_unnamed(const int32_t* rows, int64_t count, void* dkept, int64_t kept_rows, int64_t row_bytes) {
  std::vector<char> named(static_cast<size_t>(kept_rows), 0);
  for (int64_t t = 0; t < count; ++t)
    if (rows[t] >= 0) named[static_cast<size_t>(rows[t])] = 1;
  for (int64_t k = 0; k < kept_rows; ++k)
    if (!named[static_cast<size_t>(k)])
      std::memset(as<char>(dkept) + k * row_bytes, 0, static_cast<size_t>(row_bytes));
}

// Indices were checked by forward. A null gradient is not wanted; dsums is accumulators [2][2][width]: by modality
// (image, text), then by masked or kept.
void backward(Address dout, Address rows, Address slots, Address dkept, Address dsums, Address dimage_position,
              Address dtext_position, int64_t count, int64_t kept_rows, int64_t width, int64_t patches, int64_t words,
              int kept_dtype, int out_dtype) {
  const Dtype dtype = Dtype(out_dtype);
  if (dkept) zero_unnamed(int32s(rows), count, pointer(dkept), kept_rows, width * size_of(Dtype(kept_dtype)));
  if (dkept || dsums) {
    const RestoreTokensBackward args{pointer(dout), int32s(rows), int32s(slots), pointer(dkept),
                                     width, static_cast<int32_t>(patches), Dtype(kept_dtype), dtype};
    const auto kernel = M3AE_DISPATCH(restore_tokens_backward);
    reduce_rows(count, 4 * width, dtype, pointer(dsums),
                [&](int64_t begin, int64_t end, void* partial) { kernel(args, begin, end, partial); });
  }
  const auto position = [&](Address dtable, int64_t first, int64_t table_rows) {
    if (!dtable) return;
    sum_rows(pointer(dout), dtype, int32s(slots), count, static_cast<int32_t>(first), table_rows, width,
             pointer(dtable), dtype);
  };
  position(dimage_position, 0, patches);
  position(dtext_position, patches, words);
}

}  // namespace

void bind_restore_tokens(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("restore_tokens", &forward, no_gil);
  module.def("restore_tokens_backward", &backward, no_gil);
}

}  // namespace m3ae
