#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include <cstring>
#include <vector>

#include "cpu/pages.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "reduction.h"

namespace py = pybind11;

namespace m3ae {
namespace {

constexpr int64_t kLogitsBytes = int64_t{32} << 20;  // of a block. Every block reads and packs the whole weight thrice

// The rows whose target is a class, each with its share of the reduced loss; every other target must be ignore_index.
// Rows past the last sequence are not looked at.
template <class Integer>
std::vector<CrossEntropyRow> rows_that_count(const Integer* target, int64_t count, const int32_t* cu, int64_t sequences,
                                             int64_t vocab, int64_t ignore_index, Reduction reduction) {
  std::vector<CrossEntropyRow> rows;
  for (int64_t n = 0; n < sequences; ++n) {
    const size_t first = rows.size();
    for (int64_t t = cu ? cu[n] : 0, end = cu ? cu[n + 1] : count; t < end; ++t) {
      if (target[t] == ignore_index) continue;
      M3AE_CHECK(target[t] >= 0 && target[t] < vocab, "target must be in [0, ", vocab, ") or ignore_index (",
                 ignore_index, "), got ", target[t], " at row ", t);
      rows.push_back({static_cast<int32_t>(t), static_cast<int32_t>(target[t]), 1, 0, 0, false});
    }
    if (reduction != Reduction::sample_mean) continue;
    const int64_t parts = static_cast<int64_t>(rows.size() - first) * sequences;
    for (size_t i = first; i < rows.size(); ++i) rows[i].share = 1.0 / static_cast<double>(parts);
  }
  if (reduction == Reduction::mean)
    for (CrossEntropyRow& row : rows) row.share = 1.0 / static_cast<double>(rows.size());
  return rows;
}

void zero(void* data, int64_t bytes) {
  constexpr int64_t kGrain = int64_t{1} << 18;
  parallel_for(data ? bytes : 0, kGrain, [&](int64_t begin, int64_t end) {
    std::memset(as<char>(data) + begin, 0, static_cast<size_t>(end - begin));
  });
}

// The losses and hits of these rows; the gradients, of sum(dloss * loss), of what they belong to.
void run_blocks(CrossEntropyBlock args, std::vector<CrossEntropyRow>* rows) {
  const int64_t count = static_cast<int64_t>(rows->size()), width = args.width, vocab = args.vocab;
  const auto sizes_of = M3AE_DISPATCH_PRODUCT(cross_entropy_sizes);
  const int64_t most = kLogitsBytes / sizes_of(args, 1).logits_row;
  const int64_t blocks = most > 0 ? (count + most - 1) / most : count, high = (count + blocks - 1) / blocks;
  const CrossEntropySizes sizes = sizes_of(args, high);
  const int64_t bytes[] = {high * sizes.logits_row, high * sizes.x_rows_row, high * sizes.x_steps_row};
  const Scratch scratch(bytes[0] + bytes[1] + bytes[2] + sizes.scratch * max_threads());
  args.logits = scratch.get(), args.x_rows = args.logits + bytes[0], args.x_steps = args.x_rows + bytes[1];
  char* const of_threads = args.x_steps + bytes[2];
  prefer_huge_pages(args.logits, bytes[0]);
  if (args.dweight) prefer_huge_pages(args.dweight, vocab * width * size_of(args.parameter_dtype));
  const auto stage = [&](int64_t tasks, auto kernel) {
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  };
  const auto stage_with_scratch = [&](int64_t tasks, auto kernel) {
    parallel_for_dynamic(tasks, [&](int64_t i, int thread) {
      kernel(args, of_threads + thread * sizes.scratch, i, i + 1);
    });
  };
  const int64_t panels = (vocab + kClassPanel - 1) / kClassPanel, columns = (width + kDxColumns - 1) / kDxColumns;
  for (int64_t block = 0; block < blocks; ++block) {
    const Range range = chunk_range(count, blocks, block);
    args.rows = rows->data() + range.begin;
    args.count = range.end - range.begin;
    args.first = block == 0;
    stage(args.count, M3AE_DISPATCH_PRODUCT(cross_entropy_pack));
    stage_with_scratch(panels, M3AE_DISPATCH_PRODUCT(cross_entropy_logits));
    stage(args.count, M3AE_DISPATCH_PRODUCT(cross_entropy_softmax));
    if (args.dx) stage_with_scratch((args.count + kDxRows - 1) / kDxRows * columns, M3AE_DISPATCH_PRODUCT(cross_entropy_dx));
    if (args.dweight || args.dbias) stage_with_scratch(panels, M3AE_DISPATCH_PRODUCT(cross_entropy_dweight));
  }
}

// loss, hit: reduced, or with reduction "none" one a row. The gradients are those of the reduced loss, or with "none"
// of sum(dloss * loss).
void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& target, const Tensor& cu_seqlens,
             const Tensor& dloss, int64_t ignore_index, const std::string& reduction_name, double label_smoothing,
             int products, const Tensor& loss, const Tensor& hit, const Tensor& dx, const Tensor& dweight, const Tensor& dbias) {
  const Reduction reduction = reduction_of(reduction_name);
  const bool each = reduction == Reduction::none;
  const int64_t count = x.size(0), width = x.size(1), vocab = weight.size(0);
  const int64_t sequences = cu_seqlens ? sequences_of("cu_seqlens", cu_seqlens) : 1;
  M3AE_CHECK(count < int64_t{1} << 31 && vocab < int64_t{1} << 31, "x and weight must have less than 2^31 rows, got ",
             count, " and ", vocab);
  const Dtype dtype = x.dtype(), parameter_dtype = weight.dtype(), accumulate = accumulator(dtype);
  const CrossEntropyBlock args{
      x.dense("x", {count, width}), weight.dense("weight", {vocab, width}),
      bias.optional("bias", {vocab}, parameter_dtype), dx.optional("dx", {count, width}, dtype),
      dweight.optional("dweight", {vocab, width}, parameter_dtype), dbias.optional("dbias", {vocab}, accumulate), width,
      vocab, label_smoothing, dtype, parameter_dtype, bf16_parts(static_cast<Products>(products)), nullptr, 0, false, nullptr, nullptr, nullptr};
  const void* dlosses = each && (dx || dweight || dbias) ? dloss.dense("dloss", {count}, accumulate) : nullptr;
  const Reduced losses("loss", loss, reduction, count, accumulate), hits("hit", hit, reduction, count, accumulate);
  const int32_t* cu = cu_seqlens.optional_int32s("cu_seqlens", {sequences + 1});
  if (cu) check_offsets("cu_seqlens", cu, sequences, count);
  const auto collect = [&](const auto* targets) {
    return rows_that_count(targets, count, cu, sequences, vocab, ignore_index, reduction);
  };
  std::vector<CrossEntropyRow> rows = target.is_int64() ? collect(target.integers<int64_t>("target", {count}))
                                                        : collect(target.int32s("target", {count}));
  const auto as_accumulator = [&](const void* values, int64_t at) {
    return accumulate == Dtype::f64 ? as<double>(values)[at] : as<float>(values)[at];
  };
  for (CrossEntropyRow& row : rows)
    row.dloss = dlosses                    ? as_accumulator(dlosses, row.row)
                : accumulate == Dtype::f64 ? row.share
                                           : static_cast<float>(row.share);
  if (static_cast<int64_t>(rows.size()) < count) zero(args.dx, count * width * size_of(dtype));
  if (rows.empty()) {
    zero(args.dweight, vocab * width * size_of(parameter_dtype));
    zero(args.dbias, vocab * size_of(accumulate));
  } else {
    run_blocks(args, &rows);
  }
  const auto reduce = [&](const Reduced& out, auto value_of) {
    if (!each)
      return out.write(0, sum_in_chains(rows.size(), [&](int64_t i) { return value_of(rows[i]) * rows[i].share; }));
    for (int64_t t = 0; t < count; ++t) out.write(t, 0);
    for (const CrossEntropyRow& row : rows) out.write(row.row, value_of(row));
  };
  reduce(losses, [](const CrossEntropyRow& row) { return row.loss; });
  if (hit) reduce(hits, [](const CrossEntropyRow& row) { return row.hit ? 1.0 : 0.0; });
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  bind(module, "linear_cross_entropy", forward, {"x", "weight", "bias", "target", "cu_seqlens", "dloss",
       "ignore_index", "reduction", "label_smoothing", "products", "loss", "hit", "dx", "dweight", "dbias"});
}

}  // namespace m3ae
