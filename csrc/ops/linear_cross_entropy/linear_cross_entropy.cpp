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

// The rows whose target is a class, each with its shares of what is reduced; every other target must be ignore_index.
// Rows past the last sequence are not looked at. weight_of(class): what its cross entropy weighs.
template <class Integer, class WeightOf>
std::vector<CrossEntropyRow> rows_that_count(const Integer* target, int64_t count, const int32_t* cu, int64_t sequences,
                                             int64_t vocab, int64_t ignore_index, Reduction reduction,
                                             const WeightOf& weight_of) {
  std::vector<CrossEntropyRow> rows;
  const auto share = [&](size_t first, int64_t means) {  // of a mean, that many of which are averaged
    const double number = static_cast<double>(rows.size() - first);
    double weight = 0;
    for (size_t i = first; i < rows.size(); ++i) weight += rows[i].weight;
    for (size_t i = first; i < rows.size(); ++i) {
      rows[i].share = 1 / (number * means);
      rows[i].loss_share = weight == 0 ? 0 : 1 / (weight * means);
    }
  };
  for (int64_t n = 0; n < sequences; ++n) {
    const size_t first = rows.size();
    for (int64_t t = cu ? cu[n] : 0, end = cu ? cu[n + 1] : count; t < end; ++t) {
      if (target[t] == ignore_index) continue;
      M3AE_CHECK(target[t] >= 0 && target[t] < vocab, "target must be in [0, ", vocab, ") or ignore_index (",
                 ignore_index, "), got ", target[t], " at row ", t);
      rows.push_back({static_cast<int32_t>(t), static_cast<int32_t>(target[t]), weight_of(target[t])});
    }
    if (reduction == Reduction::sample_mean) share(first, sequences);
  }
  if (reduction == Reduction::mean) share(0, 1);
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

// loss, hit, z_loss: reduced, or with reduction "none" one a row, as lse always is. The gradients are those of
// sum(dloss * loss) + sum(dlse * lse); a dloss or dlse that is None is 1 or 0.
void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& target, const Tensor& cu_seqlens,
             const Tensor& class_weight, const Tensor& dloss, const Tensor& dlse, int64_t ignore_index,
             const std::string& reduction_name, double label_smoothing, double lse_square_scale, int products,
             const Tensor& loss, const Tensor& hit, const Tensor& lse, const Tensor& z_loss, const Tensor& dx,
             const Tensor& dweight, const Tensor& dbias) {
  const Reduction reduction = reduction_of(reduction_name);
  const bool each = reduction == Reduction::none;
  const int64_t count = x.size(0), width = x.size(1), vocab = weight.size(0);
  const int64_t sequences = cu_seqlens ? sequences_of("cu_seqlens", cu_seqlens) : 1;
  M3AE_CHECK(count < int64_t{1} << 31 && vocab < int64_t{1} << 31, "x and weight must have less than 2^31 rows, got ",
             count, " and ", vocab);
  const Dtype dtype = x.dtype(), parameter_dtype = weight.dtype(), accumulate = accumulator(dtype);
  const auto number = [&](const void* values, int64_t at) {
    return accumulate == Dtype::f64 ? as<double>(values)[at] : as<float>(values)[at];
  };
  const void* const weights = class_weight.optional("class_weight", {vocab}, accumulate);
  const auto weight_of = [&](int64_t v) { return weights ? number(weights, v) : 1.0; };
  const bool smoothed = weights && label_smoothing > 0;
  const CrossEntropyBlock args{
      x.dense("x", {count, width}), weight.dense("weight", {vocab, width}),
      bias.optional("bias", {vocab}, parameter_dtype), dx.optional("dx", {count, width}, dtype),
      dweight.optional("dweight", {vocab, width}, parameter_dtype), dbias.optional("dbias", {vocab}, accumulate), width,
      vocab, label_smoothing, smoothed ? weights : nullptr, smoothed ? sum_in_chains(vocab, weight_of) / vocab : 1,
      dtype, parameter_dtype, bf16_parts(static_cast<Products>(products)), nullptr, 0, false, nullptr, nullptr,
      nullptr};
  const void* const dlosses =
      each ? dloss.optional("dloss", {count}, accumulate) : dloss.optional("dloss", {}, accumulate);
  const void* const dlses = dlse.optional("dlse", {count}, accumulate);
  const Reduced losses("loss", loss, reduction, count, accumulate), hits("hit", hit, reduction, count, accumulate),
      z_losses("z_loss", z_loss, reduction, count, accumulate), lses("lse", lse, Reduction::none, count, accumulate);
  const int32_t* cu = cu_seqlens.optional_int32s("cu_seqlens", {sequences + 1});
  if (cu) check_offsets("cu_seqlens", cu, sequences, count);
  const auto collect = [&](const auto* targets) {
    return rows_that_count(targets, count, cu, sequences, vocab, ignore_index, reduction, weight_of);
  };
  std::vector<CrossEntropyRow> rows = target.is_int64() ? collect(target.integers<int64_t>("target", {count}))
                                                        : collect(target.int32s("target", {count}));
  for (CrossEntropyRow& row : rows) {
    const double incoming = dlosses ? number(dlosses, each ? row.row : 0) : 1, of_loss = incoming * row.loss_share;
    row.dloss = accumulate == Dtype::f64 ? of_loss : static_cast<float>(of_loss);
    row.dlse = dlses ? number(dlses, row.row) : 0;
    row.dsquares = incoming * row.share * lse_square_scale;
  }
  if (static_cast<int64_t>(rows.size()) < count) zero(args.dx, count * width * size_of(dtype));
  if (rows.empty()) {
    zero(args.dweight, vocab * width * size_of(parameter_dtype));
    zero(args.dbias, vocab * size_of(accumulate));
  } else {
    run_blocks(args, &rows);
  }
  const auto write_rows = [&](const Reduced& out, const auto& value_of) {
    for (int64_t t = 0; t < count; ++t) out.write(t, 0);
    for (const CrossEntropyRow& row : rows) out.write(row.row, value_of(row));
  };
  const auto reduce = [&](const Reduced& out, const auto& value_of) {  // of a row, with its share
    if (each) write_rows(out, value_of);
    else out.write(0, sum_in_chains(rows.size(), [&](int64_t i) { return value_of(rows[i]); }));
  };
  const auto z_of = [&](const CrossEntropyRow& row) { return lse_square_scale * row.lse * row.lse * row.share; };
  reduce(losses, [&](const CrossEntropyRow& row) { return row.loss * row.loss_share + z_of(row); });
  if (hit) reduce(hits, [](const CrossEntropyRow& row) { return row.hit ? row.share : 0; });
  if (z_loss) reduce(z_losses, z_of);
  if (lse) write_rows(lses, [](const CrossEntropyRow& row) { return row.lse; });
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  bind(module, "linear_cross_entropy", forward, {"x", "weight", "bias", "target", "cu_seqlens", "class_weight",
       "dloss", "dlse", "ignore_index", "reduction", "label_smoothing", "lse_square_scale", "products", "loss", "hit",
       "lse", "z_loss", "dx", "dweight", "dbias"});
}

}  // namespace m3ae
