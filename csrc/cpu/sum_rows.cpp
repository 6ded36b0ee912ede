#include "cpu/sum_rows.h"

#include <vector>

#include "cpu/pages.h"
#include "cpu/threads.h"

namespace m3ae {

void sum_rows(const void* rows, Dtype rows_dtype, const int32_t* index, int64_t count, int32_t first, int64_t groups,
              int64_t width, void* out, Dtype out_dtype) {
  const auto inside = [&](int64_t t) { return index[t] >= first && index[t] < first + groups; };
  std::vector<int64_t> starts(static_cast<size_t>(groups) + 1, 0);
  for (int64_t t = 0; t < count; ++t)
    if (inside(t)) ++starts[static_cast<size_t>(index[t] - first) + 1];
  for (size_t g = 1; g < starts.size(); ++g) starts[g] += starts[g - 1];
  std::vector<int32_t> order(static_cast<size_t>(starts.back()));
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t t = 0; t < count; ++t)
    if (inside(t)) order[static_cast<size_t>(next[static_cast<size_t>(index[t] - first)]++)] = static_cast<int32_t>(t);

  prefer_huge_pages(out, groups * width * size_of(out_dtype));
  const SumRows args{rows, order.data(), starts.data(), out, width, rows_dtype, out_dtype};
  const auto kernel = M3AE_DISPATCH(sum_rows);
  parallel_for(groups, grain_rows(width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace m3ae
