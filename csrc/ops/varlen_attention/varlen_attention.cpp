#include <pybind11/stl.h>  // std::optional

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "ops/varlen_attention/arguments.h"

namespace py = pybind11;

namespace m3ae {
namespace {

constexpr int64_t kWidestVector = 16, kMostWholeRows = 32;  // of any instruction set: csrc/cpu/units.h

int64_t pieces(std::initializer_list<int64_t> counts, Dtype dtype) {
  int64_t bytes = 64;
  for (int64_t count : counts) bytes += count * (dtype == Dtype::f64 ? 8 : 4) + 64;
  return bytes;
}

}  // namespace

// As if every unit were one element: bf16 pairs need less.
int64_t workspace_bytes(int64_t width, Dtype dtype) {
  const int64_t lanes = (width + kWidestVector - 1) / kWidestVector * kWidestVector;
  const int64_t keys = kKeyBlock + kWidestVector;
  return pieces({lanes * keys, keys * lanes, kRowBlock * lanes, kScores + kMostWholeRows * keys, kQueryBlock * lanes,
                 3 * kQueryBlock, kRowBlock * kWidestVector}, dtype);
}

int64_t backward_workspace_bytes(int64_t width, int64_t longest_key, Dtype dtype) {
  const int64_t lanes = (width + kWidestVector - 1) / kWidestVector * kWidestVector;
  const int64_t queries = kGradQueryBlock + kWidestVector, keys = kGradKeyBlock + 1;
  const int64_t key_rows = longest_key + kWidestVector;
  return pieces({lanes * queries, lanes * queries, queries * lanes, queries * lanes, queries, queries, queries, keys * lanes,
                 keys * lanes, keys * lanes, kMostWholeRows * queries, keys * queries, keys * queries, queries * lanes,
                 key_rows * lanes, key_rows * lanes}, dtype);
}

namespace {

// The offsets of one side; `other` where they are None. most: no length is beyond it.
struct Offsets {
  Offsets(const char* side, const Tensor& given, const Tensor& other, int64_t rows, std::optional<int64_t> most) {
    const std::string name = std::string("cu_seqlens_") + side;
    const Tensor& offsets = given ? given : other;
    batch = sequences_of(name.c_str(), offsets);
    cu = offsets.int32s(name.c_str(), {batch + 1});
    longest = check_offsets(name.c_str(), cu, batch, rows);
    M3AE_CHECK(longest <= most.value_or(longest), "max_seqlen_", side, " must be at least the longest length, ", longest,
               ", got ", *most);
  }
  int64_t batch, longest;
  const int32_t* cu;
};

void check_equal(int64_t key_sequences, int64_t sequences) {
  M3AE_CHECK(key_sequences == sequences, "cu_seqlens_k must hold ", sequences, " sequences, got ", key_sequences);
}

// The whole call as tasks, the most work first. Neighbouring heads lie side by side in memory, so a task takes several
// where that leaves each thread some sixteen tasks to choose from.
std::vector<AttentionTask> tasks(const int32_t* cu_q, const int32_t* cu_k, int64_t batch, int64_t heads,
                                 int64_t query_block) {
  const int64_t heads_each = std::clamp<int64_t>(batch * heads / (16 * max_threads()), 1, heads);
  std::vector<AttentionTask> list;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t queries = cu_q[b + 1] - cu_q[b], keys = cu_k[b + 1] - cu_k[b];
    if (query_block && queries == 0) continue;  // forward: nothing is written
    const int64_t blocks = std::max<int64_t>(1, query_block ? (queries + query_block - 1) / query_block : 1);
    for (int64_t i = 0; i < blocks; ++i) {
      const Range range = chunk_range(queries, blocks, i);
      for (int64_t h = 0; h < heads; h += heads_each)
        list.push_back({cu_q[b] + range.begin, range.end - range.begin, cu_k[b], keys, h,
                        std::min(heads_each, heads - h)});
    }
  }
  std::stable_sort(list.begin(), list.end(), [](const AttentionTask& x, const AttentionTask& y) {
    return x.queries * x.keys * x.heads > y.queries * y.keys * y.heads;
  });
  return list;
}

// kernel(task, the task this thread is likely to get next or null, workspace) for each.
template <class Kernel>
void run(const std::vector<AttentionTask>& list, int64_t bytes, const Kernel& kernel) {
  bytes = (bytes + 63) / 64 * 64;
  const int64_t count = static_cast<int64_t>(list.size()), threads = max_threads();
  const Scratch scratch(bytes * threads);
  parallel_for_dynamic(count, [&](int64_t i, int thread) {
    const AttentionTask* task = list.data() + i;
    kernel(*task, i + threads < count ? task + threads : nullptr, scratch.get() + thread * bytes);
  });
}

// Rows [begin, end) become 0.
void zero_rows(const HeadRows& x, int64_t begin, int64_t end, int64_t heads, int64_t width, Dtype dtype) {
  const int64_t item = size_of(dtype);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t h = 0; h < heads; ++h)
      std::memset(as<char>(x.data) + (row * x.row + h * x.head) * item, 0, static_cast<size_t>(width * item));
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
             std::optional<int64_t> max_q, std::optional<int64_t> max_k, std::optional<double> scale, const Tensor& out,
             const Tensor& stats) {
  const VarlenAttention args = varlen_attention_arguments(q, k, v, scale, out, stats);
  const Offsets queries("q", cu_q, cu_q, q.size(0), max_q), keys("k", cu_k, cu_q, k.size(0), max_k);
  check_equal(keys.batch, queries.batch);
  const auto list = tasks(queries.cu, keys.cu, queries.batch, args.heads, kQueryBlock);
  const auto kernel = M3AE_DISPATCH_PRODUCT(varlen_attention);
  run(list, workspace_bytes(args.width, args.dtype),
      [&](const AttentionTask& task, const AttentionTask* next, void* memory) { kernel(args, task, next, memory); });

  const int64_t end = queries.cu[queries.batch];
  zero_rows({args.out, args.heads * args.width, args.width}, end, args.query_rows, args.heads, args.width, args.dtype);
  for (int64_t h = 0; h < args.heads; ++h)
    for (int64_t row = end; row < args.query_rows; ++row) {
      const int64_t peak = h * args.query_rows + row, log_total = peak + args.heads * args.query_rows;
      if (args.dtype == Dtype::f64) as<double>(args.stats)[peak] = 0, as<double>(args.stats)[log_total] = -HUGE_VAL;
      else as<float>(args.stats)[peak] = 0, as<float>(args.stats)[log_total] = -HUGE_VALF;
    }
}

void backward(const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& out, const Tensor& stats, const Tensor& cu_q, const Tensor& cu_k, std::optional<double> scale,
              const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const VarlenAttentionBackward args = varlen_attention_arguments(dout, dlse, q, k, v, out, stats, scale, dq, dk, dv);
  const Offsets queries("q", cu_q, cu_q, q.size(0), {}), keys("k", cu_k, cu_q, k.size(0), {});
  check_equal(keys.batch, queries.batch);
  const int64_t key_rows = k.size(0), key_heads = k.size(1);
  const auto list = tasks(queries.cu, keys.cu, queries.batch, key_heads, 0);
  const auto kernel = M3AE_DISPATCH_PRODUCT(varlen_attention_backward);
  run(list, backward_workspace_bytes(args.width, keys.longest, args.dtype),
      [&](const AttentionTask& task, const AttentionTask*, void* memory) { kernel(args, task, memory); });
  zero_rows(args.dq, queries.cu[queries.batch], args.query_rows, args.heads, args.width, args.dtype);
  zero_rows(args.dk, keys.cu[keys.batch], key_rows, key_heads, args.width, args.dtype);
  zero_rows(args.dv, keys.cu[keys.batch], key_rows, key_heads, args.width, args.dtype);
}

}  // namespace

void bind_varlen_attention(py::module_& module) {
  bind(module, "varlen_attention", forward, {"q", "k", "v", "cu_q", "cu_k", "max_q", "max_k", "scale", "out", "stats"});
  bind(module, "varlen_attention_backward", backward, {"dout", "dlse", "q", "k", "v", "out", "stats", "cu_q", "cu_k",
       "scale", "dq", "dk", "dv"});
}

}  // namespace m3ae
