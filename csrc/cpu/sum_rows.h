// Sums of rows by index: out[g] = the sum of rows[t] over every t with index[t] == g, in ascending t, so the same bits
// for any thread count and without atomics. The gradient of every table that is looked up.
#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

struct SumRows {
  const void* rows;       // [T, width]
  const int32_t* order;   // t, grouped by index, ascending within a group
  const int64_t* starts;  // [groups + 1] into order
  void* out;              // [groups, width], written whole, also where a group is empty
  int64_t width;
  Dtype rows_dtype, out_dtype;
};

// index[t] outside [first, first + groups) is passed over; group g is index first + g.
void sum_rows(const void* rows, Dtype rows_dtype, const int32_t* index, int64_t count, int32_t first, int64_t groups,
              int64_t width, void* out, Dtype out_dtype);

}  // namespace m3ae

M3AE_KERNEL(void sum_rows(const SumRows& args, int64_t begin, int64_t end))
