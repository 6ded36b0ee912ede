#include "ops/restore_tokens/restore_tokens.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "check.h"
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
  const auto kernel = M3AE_DISPATCH(restore_tokens);
  parallel_for(count, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// dkept arrives zeroed where rows leaves a kept row out. partial: [chunks][4][width], zeroed, summed by the caller.
void backward(Address dout, Address rows, Address slots, Address dkept, Address partial, int64_t chunks, int64_t count,
              int64_t width, int64_t patches, int kept_dtype, int out_dtype) {
  const RestoreTokensBackward args{pointer(dout),    int32s(rows), int32s(slots),
                                   pointer(dkept),   pointer(partial), width,
                                   static_cast<int32_t>(patches), Dtype(kept_dtype), Dtype(out_dtype)};
  const auto kernel = M3AE_DISPATCH(restore_tokens_backward);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Range range = chunk_range(count, chunks, c);
      kernel(args, c, range.begin, range.end);
    }
  });
}

}  // namespace

void bind_restore_tokens(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("restore_tokens", &forward, no_gil);
  module.def("restore_tokens_backward", &backward, no_gil);
}

}  // namespace m3ae
