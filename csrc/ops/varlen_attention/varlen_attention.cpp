#include "ops/varlen_attention/varlen_attention.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace m3ae {
namespace {

constexpr int64_t kWidestVector = 16;  // of any instruction set

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
  return pieces({lanes * keys, keys * lanes, kRowBlock * lanes, kScores + 8 * keys, kQueryBlock * lanes,
                 3 * kQueryBlock, kRowBlock * kWidestVector}, dtype);
}

int64_t backward_workspace_bytes(int64_t width, int64_t longest_key, Dtype dtype) {
  const int64_t lanes = (width + kWidestVector - 1) / kWidestVector * kWidestVector;
  const int64_t queries = kGradQueryBlock + kWidestVector, keys = kGradKeyBlock + 1;
  return pieces({lanes * queries, lanes * queries, queries * lanes, queries * lanes, queries, queries, keys * lanes,
                 keys * lanes, keys * lanes, kGradRowBlock * queries, keys * queries, keys * queries, queries * lanes,
                 longest_key * lanes, longest_key * lanes}, dtype);
}

namespace {

// Memory of the calling thread, kept between calls: fresh pages would cost more than the work on them.
char* workspace(size_t bytes) {
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
    size = bytes;
  }
  return memory.get();
}

// Offsets ascend from 0 to at most `rows`, no length past `most` (-1: not said). Returns the longest.
int64_t check_offsets(const char* side, const int32_t* cu, int64_t batch, int64_t rows, int64_t most) {
  M3AE_CHECK(cu[0] == 0, "cu_seqlens", side, " must start at 0, got cu_seqlens", side, "[0] = ", cu[0]);
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    M3AE_CHECK(cu[b] <= cu[b + 1], "cu_seqlens", side, " must ascend, got ", cu[b], ", ", cu[b + 1], " at cu_seqlens",
               side, "[", b, "]");
    longest = std::max<int64_t>(longest, cu[b + 1] - cu[b]);
  }
  M3AE_CHECK(cu[batch] <= rows, "cu_seqlens", side, " must end within its ", rows, " rows, got ", cu[batch]);
  M3AE_CHECK(most < 0 || longest <= most, "max_seqlen", side, " must be at least the longest length, ", longest,
             ", got ", most);
  return longest;
}

// The whole call as tasks, the most work first. Neighbouring heads lie side by side in memory, so a task takes several
// where that leaves each thread some sixteen tasks to choose from.
std::vector<AttentionTask> tasks(const int32_t* cu_q, const int32_t* cu_k, int64_t batch, int64_t heads,
                                 int64_t query_block) {
  const int64_t heads_each = std::clamp<int64_t>(batch * heads / (16 * max_threads()), 1, heads);
  std::vector<AttentionTask> list;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t queries = cu_q[b + 1] - cu_q[b], keys = cu_k[b + 1] - cu_k[b];
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
  char* memory = workspace(static_cast<size_t>(bytes * threads));
  parallel_for_dynamic(count, [&](int64_t i, int thread) {
    const AttentionTask* task = list.data() + i;
    kernel(*task, i + threads < count ? task + threads : nullptr, memory + thread * bytes);
  });
}

int64_t item_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Rows [begin, end) become 0.
void zero_rows(const HeadRows& x, int64_t begin, int64_t end, int64_t heads, int64_t width, Dtype dtype) {
  const int64_t item = item_bytes(dtype);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t h = 0; h < heads; ++h)
      std::memset(as<char>(x.data) + (row * x.row + h * x.head) * item, 0, static_cast<size_t>(width * item));
}

using Strides = std::tuple<Address, int64_t, int64_t>;  // address, row stride, head stride
HeadRows head_rows(const Strides& x) { return {pointer(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }

void forward(Strides q, Strides k, Strides v, Address cu_q, Address cu_k, Address out, Address lse, int64_t batch,
             int64_t query_rows, int64_t key_rows, int64_t heads, int64_t key_heads, int64_t width, int64_t max_q,
             int64_t max_k, double scale, int dtype) {
  check_offsets("_q", int32s(cu_q), batch, query_rows, max_q);
  check_offsets("_k", int32s(cu_k), batch, key_rows, max_k);
  const VarlenAttention args{head_rows(q), head_rows(k), head_rows(v), pointer(out), pointer(lse), query_rows, heads,
                             heads / key_heads, width, scale, Dtype(dtype)};
  const auto list = tasks(int32s(cu_q), int32s(cu_k), batch, heads, kQueryBlock);
  const auto kernel = M3AE_DISPATCH_PRODUCT(varlen_attention);
  run(list, workspace_bytes(width, args.dtype),
      [&](const AttentionTask& task, const AttentionTask* next, void* memory) { kernel(args, task, next, memory); });

  const int64_t end = int32s(cu_q)[batch];
  zero_rows({args.out, heads * width, width}, end, query_rows, heads, width, args.dtype);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t row = end; row < query_rows; ++row) {
      if (args.dtype == Dtype::f64) as<double>(args.lse)[h * query_rows + row] = -HUGE_VAL;
      else as<float>(args.lse)[h * query_rows + row] = -HUGE_VALF;
    }
}

void backward(Strides dout, Strides q, Strides k, Strides v, Address out, Address lse, Address dlse, Address cu_q,
              Address cu_k, Strides dq, Strides dk, Strides dv, int64_t batch, int64_t query_rows, int64_t key_rows,
              int64_t heads, int64_t key_heads, int64_t width, int64_t max_q, int64_t max_k, double scale, int dtype) {
  check_offsets("_q", int32s(cu_q), batch, query_rows, max_q);
  const int64_t longest_key = check_offsets("_k", int32s(cu_k), batch, key_rows, max_k);
  const VarlenAttentionBackward args{head_rows(dout), head_rows(q), head_rows(k), head_rows(v), pointer(out),
                                     pointer(lse), pointer(dlse), head_rows(dq), head_rows(dk), head_rows(dv),
                                     query_rows, heads, heads / key_heads, width, scale, Dtype(dtype)};
  const auto list = tasks(int32s(cu_q), int32s(cu_k), batch, key_heads, 0);
  const auto kernel = M3AE_DISPATCH_PRODUCT(varlen_attention_backward);
  run(list, backward_workspace_bytes(width, longest_key, args.dtype),
      [&](const AttentionTask& task, const AttentionTask*, void* memory) { kernel(args, task, memory); });
  zero_rows(args.dq, int32s(cu_q)[batch], query_rows, heads, width, args.dtype);
  zero_rows(args.dk, int32s(cu_k)[batch], key_rows, key_heads, width, args.dtype);
  zero_rows(args.dv, int32s(cu_k)[batch], key_rows, key_heads, width, args.dtype);
}

}  // namespace

void bind_varlen_attention(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("varlen_attention", &forward, no_gil);
  module.def("varlen_attention_backward", &backward, no_gil);
}

}  // namespace m3ae
