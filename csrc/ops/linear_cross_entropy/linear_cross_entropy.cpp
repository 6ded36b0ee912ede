#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "check.h"
#include "cpu/pages.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

constexpr int64_t kLogitsBytes = int64_t{32} << 20;  // of a block. Every block reads and packs the whole weight thrice

// The rows whose target is a class; every other target must be ignore_index.
std::vector<int32_t> rows_that_count(const int32_t* target, int64_t count, int64_t vocab, int64_t ignore_index) {
  std::vector<int32_t> rows;
  for (int64_t t = 0; t < count; ++t) {
    if (target[t] == ignore_index) continue;
    M3AE_CHECK(target[t] >= 0 && target[t] < vocab, "target must be in [0, ", vocab, ") or ignore_index (", ignore_index,
               "), got ", target[t], " at row ", t);
    rows.push_back(static_cast<int32_t>(t));
  }
  return rows;
}

// Returns how many rows count. loss, hit and dx arrive zeroed; dweight and dbias are written where any row counts.
int64_t run(Address x, Address weight, Address bias, Address target, Address dloss, Address loss, Address hit,
            Address dx, Address dweight, Address dbias, int64_t count, int64_t width, int64_t vocab,
            int64_t ignore_index, double label_smoothing, int dtype, int parameter_dtype) {
  const std::vector<int32_t> rows = rows_that_count(int32s(target), count, vocab, ignore_index);
  const int64_t found = static_cast<int64_t>(rows.size());
  if (found == 0) return 0;
  const auto sizes_of = M3AE_DISPATCH_PRODUCT(cross_entropy_sizes);
  const int64_t most = kLogitsBytes / sizes_of(1, width, vocab, Dtype(dtype)).logits_row;
  const int64_t blocks = most > 0 ? (found + most - 1) / most : found, high = (found + blocks - 1) / blocks;
  const CrossEntropySizes sizes = sizes_of(high, width, vocab, Dtype(dtype));
  const Scratch logits(high * sizes.logits_row), x_rows(high * sizes.x_rows_row), x_steps(high * sizes.x_steps_row);
  prefer_huge_pages(logits.get(), high * sizes.logits_row);
  if (dweight) prefer_huge_pages(pointer(dweight), vocab * width * size_of(Dtype(parameter_dtype)));

  CrossEntropyBlock args{pointer(x), pointer(weight), pointer(bias), int32s(target), pointer(dloss), pointer(loss),
                         pointer(hit), pointer(dx), pointer(dweight), pointer(dbias), width, vocab, label_smoothing,
                         Dtype(dtype), Dtype(parameter_dtype), nullptr, 0, false, logits.get(), x_rows.get(), x_steps.get()};
  const auto stage = [&](int64_t tasks, auto kernel) {
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  };
  const auto stage_with_scratch = [&](int64_t tasks, auto kernel) {
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(sizes.scratch);
      kernel(args, scratch.get(), begin, end);
    });
  };
  const int64_t panels = (vocab + kClassPanel - 1) / kClassPanel, columns = (width + kDxColumns - 1) / kDxColumns;
  for (int64_t block = 0; block < blocks; ++block) {
    const Range range = chunk_range(found, blocks, block);
    args.rows = rows.data() + range.begin;
    args.count = range.end - range.begin;
    args.first = block == 0;
    stage(args.count, M3AE_DISPATCH_PRODUCT(cross_entropy_pack));
    stage_with_scratch(panels, M3AE_DISPATCH_PRODUCT(cross_entropy_logits));
    stage(args.count, M3AE_DISPATCH_PRODUCT(cross_entropy_softmax));
    if (dx) stage_with_scratch((args.count + kDxRows - 1) / kDxRows * columns, M3AE_DISPATCH_PRODUCT(cross_entropy_dx));
    if (dweight || dbias) stage_with_scratch(panels, M3AE_DISPATCH_PRODUCT(cross_entropy_dweight));
  }
  return found;
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  module.def("linear_cross_entropy", &run, py::call_guard<py::gil_scoped_release>());
}

}  // namespace m3ae
