#include <cstring>
#include <vector>

#include "cpu/pages.h"
#include "cpu/reduce_rows.h"
#include "cpu/sum_rows.h"
#include "cpu/threads.h"
#include "ops/restore_tokens/arguments.h"

namespace py = pybind11;

namespace m3ae {
namespace {

// Every index inside its table, every kept row named at most once (its gradient is written, not added). Returns whether
// each kept row is named.
std::vector<char> check_indices(const int32_t* rows, const int32_t* slots, int64_t count, int64_t kept_rows,
                                int64_t table_rows) {
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
  return named;
}

void forward(const Tensor& kept, const Tensor& rows, const Tensor& slots, const Tensor& image_mask_token,
             const Tensor& text_mask_token, const Tensor& image_position, const Tensor& text_position,
             const Tensor& image_type, const Tensor& text_type, const Tensor& out) {
  const RestoreTokens args = restore_tokens_arguments(kept, rows, slots, image_mask_token, text_mask_token,
                                                      image_position, text_position, image_type, text_type, out);
  const int64_t count = out.size(0);
  check_indices(args.rows, args.slots, count, kept.size(0), image_position.size(0) + text_position.size(0));
  prefer_huge_pages(args.out, count * args.width * size_of(args.out_dtype));
  const auto kernel = M3AE_DISPATCH(restore_tokens);
  parallel_for(count, grain_rows(args.width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Indices are checked once more: they may have been written to since. dsums: [2][2][width], by modality (image, text),
// then by masked or kept.
void backward(const Tensor& dout, const Tensor& rows, const Tensor& slots, int64_t kept_rows, int64_t patches,
              int64_t words, const Tensor& dkept, const Tensor& dsums, const Tensor& dimage_position,
              const Tensor& dtext_position) {
  const int64_t count = dout.size(0), width = dout.size(1);
  constexpr int64_t most = int64_t{1} << 31;
  M3AE_CHECK(kept_rows >= 0 && patches >= 0 && words >= 0 && patches < most && words < most - patches,
             "kept_rows, patches and words must be sizes of tables, got ", kept_rows, ", ", patches, " and ", words);
  const Dtype dtype = dout.dtype();
  const RestoreTokensBackward args{dout.dense("dout", {count, width}), rows.int32s("rows", {count}),
                                   slots.int32s("slots", {count}), dkept.optional("dkept", {kept_rows, width}), width,
                                   static_cast<int32_t>(patches), dkept.dtype(), dtype};
  const std::vector<char> named = check_indices(args.rows, args.slots, count, kept_rows, patches + words);
  const int64_t row_bytes = width * size_of(args.kept_dtype);
  for (int64_t k = 0; args.dkept && k < kept_rows; ++k)
    if (!named[static_cast<size_t>(k)])
      std::memset(as<char>(args.dkept) + k * row_bytes, 0, static_cast<size_t>(row_bytes));
  if (dkept || dsums) {
    const auto kernel = M3AE_DISPATCH(restore_tokens_backward);
    reduce_rows(count, 4 * width, dtype, dsums.optional("dsums", {2, 2, width}, accumulator(dtype)),
                [&](int64_t begin, int64_t end, void* partial) { kernel(args, begin, end, partial); });
  }
  const auto position = [&](const char* name, const Tensor& dtable, int64_t first, int64_t size) {
    if (!dtable) return;
    sum_rows(args.dout, dtype, args.slots, count, static_cast<int32_t>(first), size, width,
             dtable.dense(name, {size, width}, dtype), dtype);
  };
  position("dimage_position", dimage_position, 0, patches);
  position("dtext_position", dtext_position, patches, words);
}

}  // namespace

void bind_restore_tokens(py::module_& module) {
  bind(module, "restore_tokens", forward, {"kept", "rows", "slots", "image_mask_token", "text_mask_token",
       "image_position", "text_position", "image_type", "text_type", "out"});
  bind(module, "restore_tokens_backward", backward, {"dout", "rows", "slots", "kept_rows", "patches", "words",
       "dkept", "dsums", "dimage_position", "dtext_position"});
}

}  // namespace m3ae
