// Sums over rows in fixed chunks: the same bits for any thread count, and no atomics.
#pragma once

#include <cstring>

#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "dtype.h"

namespace m3ae {

template <class Float>
void sum_partials(const void* partials, int64_t chunks, int64_t size, void* out) {
  const Float* partial = as<Float>(partials);
  Float* sum = as<Float>(out);
  for (int64_t i = 0; i < size; ++i) sum[i] = partial[i];
  for (int64_t c = 1; c < chunks; ++c)
    for (int64_t i = 0; i < size; ++i) sum[i] += partial[c * size + i];
}

// body(begin, end, partial) over rows [0, count) in chunks. It adds what it sums to `partial`, `size` accumulators
// (fp32; fp64 for Dtype::f64) that start at zero; their sum over the chunks is written to `out`. out null: partial null.
template <class Body>
void reduce_rows(int64_t count, int64_t size, Dtype dtype, void* out, const Body& body) {
  // 128 rows make a chunk's own zeroing and summing cheap; 64 to 128 chunks feed as many threads. Where chunks end does
  // not depend on the count, within a power of two: rows of zeros at the end change no bit.
  int64_t rows = 128;
  while (128 * rows < count) rows *= 2;
  const int64_t chunks = count > rows ? (count + rows - 1) / rows : 1;
  const int64_t bytes = size * (dtype == Dtype::f64 ? 8 : 4);
  const Scratch partials(out ? chunks * bytes : 0);
  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      char* partial = out ? partials.get() + c * bytes : nullptr;
      if (out) std::memset(partial, 0, static_cast<size_t>(bytes));
      body(c * rows, c + 1 < chunks ? (c + 1) * rows : count, partial);
    }
  });
  if (out && dtype == Dtype::f64) sum_partials<double>(partials.get(), chunks, size, out);
  if (out && dtype != Dtype::f64) sum_partials<float>(partials.get(), chunks, size, out);
}

}  // namespace m3ae
