// sum_rows: groups [begin, end). Pure: no threads, no allocation.
#include "cpu/sum_rows.h"

#include "cpu/vec.h"

namespace m3ae::M3AE_ISA {
namespace {

template <class V, class Row, class Out>
M3AE_INLINE void sum_group(const Row* rows, const int32_t* order, int64_t count, Out* out, int64_t width) {
  // Four vectors at a time stay in registers, so that a long group is read in runs that the prefetcher follows.
  constexpr int64_t block = 4 * V::width;
  int64_t d = 0;
  for (; d + block <= width; d += block) {
    V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t i = 0; i < count; ++i) {
      const Row* row = rows + order[i] * width + d;
      for (int j = 0; j < 4; ++j) sum[j] = sum[j] + V::load(row + j * V::width);
    }
    for (int j = 0; j < 4; ++j) sum[j].store(out + d + j * V::width);
  }
  for_lanes<V>(width - d, [&](int64_t e, int n) {
    V sum = V::zero();
    for (int64_t i = 0; i < count; ++i) sum = sum + load_lanes<V>(rows + order[i] * width + d + e, n);
    store_lanes(sum, out + d + e, n);
  });
}

template <class Row, class Out>
void run(const SumRows& a, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g)
    sum_group<Vec<Out>>(as<Row>(a.rows), a.order + a.starts[g], a.starts[g + 1] - a.starts[g],
                        as<Out>(a.out) + g * a.width, a.width);
}

}  // namespace

void sum_rows(const SumRows& a, int64_t begin, int64_t end) {
  if (a.out_dtype == Dtype::f64) return run<double, double>(a, begin, end);
  if (a.out_dtype == Dtype::bf16)
    return a.rows_dtype == Dtype::bf16 ? run<bfloat16, bfloat16>(a, begin, end) : run<float, bfloat16>(a, begin, end);
  if (a.rows_dtype == Dtype::bf16) return run<bfloat16, float>(a, begin, end);
  run<float, float>(a, begin, end);
}

}  // namespace m3ae::M3AE_ISA
