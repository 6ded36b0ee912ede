// sum_rows: groups [begin, end). Pure: no threads, no allocation.
#include "cpu/sum_rows.h"

#include "cpu/vec.h"

namespace m3ae::M3AE_ISA {
namespace {

template <class Row, class Out>
void run(const SumRows& a, int64_t begin, int64_t end) {
  using V = Vec<Out>;
  const Row* rows = as<Row>(a.rows);
  for (int64_t g = begin; g < end; ++g) {
    Out* out = as<Out>(a.out) + g * a.width;
    for_lanes<V>(a.width, [&](int64_t d, int n) {
      V sum = V::zero();
      for (int64_t i = a.starts[g]; i < a.starts[g + 1]; ++i)
        sum = sum + load_lanes<V>(rows + a.order[i] * a.width + d, n);
      store_lanes(sum, out + d, n);
    });
  }
}

}  // namespace

void sum_rows(const SumRows& a, int64_t begin, int64_t end) {
  if (a.out_dtype == Dtype::f64) return run<double, double>(a, begin, end);
  if (a.out_dtype == Dtype::bf16) return run<bfloat16, bfloat16>(a, begin, end);
  if (a.rows_dtype == Dtype::bf16) return run<bfloat16, float>(a, begin, end);
  run<float, float>(a, begin, end);
}

}  // namespace m3ae::M3AE_ISA
