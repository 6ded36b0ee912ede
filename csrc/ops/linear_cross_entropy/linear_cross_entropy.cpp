#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include <cstring>
#include <vector>

#include "cpu/pages.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "tensor.h"

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

void zero(void* data, int64_t bytes) {
  constexpr int64_t kGrain = int64_t{1} << 18;
  parallel_for(data ? bytes : 0, kGrain, [&](int64_t begin, int64_t end) {
    std::memset(as<char>(data) + begin, 0, static_cast<size_t>(end - begin));
  });
}

void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& target, const Tensor& dloss,
             int64_t ignore_index, double label_smoothing, const Tensor& loss, const Tensor& hit, const Tensor& dx,
             const Tensor& dweight, const Tensor& dbias) {
  const int64_t count = x.size(0), width = x.size(1), vocab = weight.size(0);
  const Dtype dtype = x.dtype(), parameter_dtype = weight.dtype(), accumulate = accumulator(dtype);
  CrossEntropyBlock args{x.dense("x", {count, width}), weight.dense("weight", {vocab, width}),
                         bias.optional("bias", {vocab}, parameter_dtype), target.int32s("target", {count}),
                         dx || dweight || dbias ? dloss.dense("dloss", {count}, accumulate) : nullptr,
                         loss.dense("loss", {count}, accumulate), hit.dense("hit", {count}, accumulate),
                         dx.optional("dx", {count, width}, dtype),
                         dweight.optional("dweight", {vocab, width}, parameter_dtype),
                         dbias.optional("dbias", {vocab}, accumulate), width, vocab, label_smoothing, dtype,
                         parameter_dtype, nullptr, 0, false, nullptr, nullptr, nullptr};
  const std::vector<int32_t> rows = rows_that_count(args.target, count, vocab, ignore_index);
  const int64_t found = static_cast<int64_t>(rows.size());
  zero(args.loss, count * size_of(accumulate));
  zero(args.hit, count * size_of(accumulate));
  if (found < count) zero(args.dx, count * width * size_of(dtype));
  if (found == 0) {
    zero(args.dweight, vocab * width * size_of(parameter_dtype));
    zero(args.dbias, vocab * size_of(accumulate));
    return;
  }
  const auto sizes_of = M3AE_DISPATCH_PRODUCT(cross_entropy_sizes);
  const int64_t most = kLogitsBytes / sizes_of(1, width, vocab, dtype).logits_row;
  const int64_t blocks = most > 0 ? (found + most - 1) / most : found, high = (found + blocks - 1) / blocks;
  const CrossEntropySizes sizes = sizes_of(high, width, vocab, dtype);
  const Scratch logits(high * sizes.logits_row), x_rows(high * sizes.x_rows_row), x_steps(high * sizes.x_steps_row);
  prefer_huge_pages(logits.get(), high * sizes.logits_row);
  if (args.dweight) prefer_huge_pages(args.dweight, vocab * width * size_of(parameter_dtype));
  args.logits = logits.get(), args.x_rows = x_rows.get(), args.x_steps = x_steps.get();
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
    if (args.dx) stage_with_scratch((args.count + kDxRows - 1) / kDxRows * columns, M3AE_DISPATCH_PRODUCT(cross_entropy_dx));
    if (args.dweight || args.dbias) stage_with_scratch(panels, M3AE_DISPATCH_PRODUCT(cross_entropy_dweight));
  }
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  bind(module, "linear_cross_entropy", forward, {"x", "weight", "bias", "target", "dloss", "ignore_index",
       "label_smoothing", "loss", "hit", "dx", "dweight", "dbias"});
}

}  // namespace m3ae
