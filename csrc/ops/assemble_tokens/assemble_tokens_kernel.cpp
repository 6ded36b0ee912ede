// assemble_tokens: output rows [begin, end). Pure: no threads, no allocation.
#include "ops/assemble_tokens/assemble_tokens.h"

#include "cpu/vec.h"

namespace m3ae::M3AE_ISA {
namespace {

template <class Source, class Out>
M3AE_INLINE void write_row(const AssembledRow& row, Out* out, int64_t width) {
  using V = Vec<Out>;
  const Source* source = as<Source>(row.source);
  const Out* position = as<Out>(row.position);
  const Out* type = as<Out>(row.type);
  for_lanes<V>(width, [&](int64_t d, int n) {
    const V at = position ? load_lanes<V>(position + d, n) : V::zero();
    const V of = type ? load_lanes<V>(type + d, n) : V::zero();
    const V from = source ? load_lanes<V>(source + d, n) : V::zero();
    store_lanes(from + (at + of), out + d, n);
  });
}

template <class Out>
void forward(const AssembleTokens& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    Out* out = as<Out>(a.out) + t * a.width;
    if (a.rows[t].bf16)
      write_row<bfloat16>(a.rows[t], out, a.width);
    else
      write_row<Out>(a.rows[t], out, a.width);
  }
}

template <class V, class From, class To>
M3AE_INLINE void copy_row(const From* from, To* to, int64_t width) {
  for_lanes<V>(width, [&](int64_t d, int n) { store_lanes(load_lanes<V>(from + d, n), to + d, n); });
}

template <class Out>
void backward(const AssembleTokensBackward& a, int64_t begin, int64_t end, void* partial) {
  using V = Vec<Out>;
  using Accumulator = typename V::scalar;
  const int64_t width = a.width;
  for (int64_t t = begin; t < end; ++t) {
    const DisassembledRow& row = a.rows[t];
    const Out* dout = as<Out>(a.dout) + t * width;
    if (row.target && row.bf16)
      copy_row<V>(dout, as<bfloat16>(row.target), width);
    else if (row.target)
      copy_row<V>(dout, as<Out>(row.target), width);
    if (!partial || row.part < 0) continue;
    Accumulator* sum = as<Accumulator>(partial) + row.part * width;
    for_lanes<V>(width, [&](int64_t d, int n) {
      store_lanes(load_lanes<V>(sum + d, n) + load_lanes<V>(dout + d, n), sum + d, n);
    });
  }
}

}  // namespace

void assemble_tokens(const AssembleTokens& a, int64_t begin, int64_t end) {
  if (a.out_dtype == Dtype::f64) return forward<double>(a, begin, end);
  if (a.out_dtype == Dtype::bf16) return forward<bfloat16>(a, begin, end);
  forward<float>(a, begin, end);
}

void assemble_tokens_backward(const AssembleTokensBackward& a, int64_t begin, int64_t end, void* partial) {
  if (a.out_dtype == Dtype::f64) return backward<double>(a, begin, end, partial);
  if (a.out_dtype == Dtype::bf16) return backward<bfloat16>(a, begin, end, partial);
  backward<float>(a, begin, end, partial);
}

}  // namespace m3ae::M3AE_ISA
