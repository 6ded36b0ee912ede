// Sums over many rows in one launch: every block leaves a partial sum of its own. Of each kGroup blocks the last to
// finish adds up the group's; of the groups the last adds up theirs. Which block that is, is chance; what is added, in
// which order, depends on the number of partial sums alone.
//
// Why not a second launch: it takes 2 to 3 us, and the host 3 to 5, for a few kilobytes. Why groups: a multiprocessor
// reads 100 to 200 GB/s from L2. layer_norm's gradients at 768 columns are 256 partial sums of 6 KB: one block would
// read 1.6 MB in some 10 us; 16 blocks read 98 KB each, and the last of them as much again, 0.7 us each and as much for
// each counter: 3 us, half of it while other blocks still compute. Tokens' gradients at 768 columns are 42 partial sums
// of 2 KB a tile: 32 KB, then three sums; there the two counters are most of 2 us. (H200; reasoned, not measured.)
#pragma once

#include "cuda/numbers.cuh"

namespace m3ae::cuda {

constexpr int kGroup = 16;

// How many counters a sum of `number` partial sums takes: one a group, and one for the groups.
M3AE_HOST_DEVICE int64_t sum_counters(int64_t number) { return (number + kGroup - 1) / kGroup + 1; }

// Whether the block is the last of `number` to arrive at this counter, which is zero before the first and after the
// last. To the threads of the last: reads past L1 see what any thread of the others wrote before.
__device__ __forceinline__ bool last_of(unsigned number, unsigned* counter) {
  __threadfence();
  __syncthreads();
  const bool last = __syncthreads_count(threadIdx.x == 0 && atomicInc(counter, number - 1) == number - 1) != 0;
  __threadfence();
  return last;
}

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_past_l1(const T* from) {
  Pack<T, N> to;
  if constexpr (N == 1) {
    to.at[0] = __ldcg(from);
  } else {
    static_assert(sizeof(to) == sizeof(uint4));
    const uint4 raw = __ldcg(reinterpret_cast<const uint4*>(from));
    memcpy(to.at, &raw, sizeof(raw));
  }
  return to;
}

// from[0] + from[stride] + ..., `number` of them, N columns at a time; kGroup of them are under way together.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> sum_of(const T* from, int64_t stride, unsigned number) {
  Pack<T, N> sum{};
  for (unsigned start = 0; start < number; start += kGroup) {
    Pack<T, N> some[kGroup];
#pragma unroll
    for (unsigned i = 0; i < kGroup; ++i) some[i] = load_past_l1<N>(from + min(start + i, number - 1) * stride);
#pragma unroll
    for (unsigned i = 0; i < kGroup; ++i)
#pragma unroll
      for (int c = 0; c < N; ++c) sum.at[c] += start + i < number ? some[i].at[c] : T{0};
  }
  return sum;
}

struct Partials {
  float* each;         // [number][rows][width]; null: not wanted
  float* out;          // [rows][width]: their sum
  unsigned* counters;  // sum_counters(number) for each tile
};

inline Partials partials_of(void* each, void* out, Address counters) {
  return {as<float>(each), as<float>(out), reinterpret_cast<unsigned*>(counters)};
}

// The columns that a sum's blocks share: `columns` from `first` on, of each of `rows` rows.
struct Tile {
  int rows, width, first, columns;
};

// By each block that has left its partial sum of the tile: partial sum `mine` of `number`. N: columns that a lane
// moves; fours of floats are sixteen bytes.
template <int N>
__device__ __forceinline__ void sum_partials(const Partials& a, const Tile& tile, unsigned mine, unsigned number,
                                             unsigned* counters) {
  constexpr int kFloats = N < 4 ? N : 4;
  const int64_t size = int64_t{tile.rows} * tile.width;
  const auto add = [&](const float* from, int64_t stride, unsigned count, float* to) {
    const unsigned end = static_cast<unsigned>(tile.rows * tile.columns);
    for (unsigned i = threadIdx.x * kFloats; i < end; i += blockDim.x * kFloats) {
      const int row = static_cast<int>(i) / tile.columns, column = tile.first + static_cast<int>(i) % tile.columns;
      const int64_t at = int64_t{row} * tile.width + column;
      if (column < tile.width) store(to + at, sum_of<kFloats>(from + at, stride, count));
    }
  };
  const unsigned groups = (number + kGroup - 1) / kGroup, group = mine / kGroup, first = group * kGroup;
  const unsigned count = min(number - first, unsigned{kGroup});
  if (!last_of(count, counters + group)) return;
  float* sum = a.each + first * size;  // in the place of the group's first
  add(sum, size, count, groups == 1 ? a.out : sum);
  if (groups == 1 || !last_of(groups, counters + groups)) return;
  add(a.each, kGroup * size, groups, a.out);
}

}  // namespace m3ae::cuda
