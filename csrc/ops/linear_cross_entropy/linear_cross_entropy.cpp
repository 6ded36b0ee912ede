#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include <pybind11/pybind11.h>

#include "check.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

// Every target a class or ignore_index; returns how many are classes, and in `rows` which.
int64_t rows_that_count(Address target, Address rows, int64_t count, int64_t vocab, int64_t ignore_index) {
  int64_t found = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int32_t named = int32s(target)[t];
    if (named == ignore_index) continue;
    M3AE_CHECK(named >= 0 && named < vocab, "target must be in [0, ", vocab, ") or ignore_index (", ignore_index,
               "), got ", named, " at row ", t);
    as<int32_t>(pointer(rows))[found++] = static_cast<int32_t>(t);
  }
  return found;
}

void block(Address logits, Address rows, Address target, Address dloss, Address loss, Address hit, int64_t count,
           int64_t vocab, double label_smoothing, int dtype) {
  const CrossEntropyBlock args{pointer(logits), int32s(rows), int32s(target),  pointer(dloss), pointer(loss),
                               pointer(hit),    vocab,        label_smoothing, Dtype(dtype)};
  const auto kernel = M3AE_DISPATCH(cross_entropy_block);
  parallel_for(count, grain_rows(vocab), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("rows_that_count", &rows_that_count, no_gil);
  module.def("cross_entropy_block", &block, no_gil);
}

}  // namespace m3ae
