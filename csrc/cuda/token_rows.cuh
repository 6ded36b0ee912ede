// Rows of tokens: written from their parts, a warp each; in the backward pass moved to where they came from and summed,
// a tile of columns and a chunk of rows a block, several rows under way at a time.
#pragma once

#include "cuda/partials.cuh"
#include "cuda/raw.cuh"

namespace m3ae::cuda {

constexpr int kRowThreads = 128, kMoveThreads = 256, kGroupThreads = 128;
constexpr int kTogether = 8;  // rows that a warp has under way

// source + (position + type): null counts as zero. Offsets in elements.
struct TokenRow {
  const void* source;
  int64_t source_at;
  Dtype source_dtype;  // position and type are of the output's
  const void* position;
  int64_t position_at;
  const void* type;
};

template <int N>
__device__ __forceinline__ void write_row(void* out, int64_t at, Dtype dtype, const TokenRow& row, int width) {
  constexpr int K = N == 8 ? 2 : 4;  // of a 16-bit type 32 bytes a lane and part
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int d = lane * N; d < width; d += K * kWarp * N) {
    Raw<N> source[K], position[K], type[K];
    load_raw(position, row.position, row.position_at, dtype, d, row.position ? width : 0);
    load_raw(type, row.type, 0, dtype, d, row.type ? width : 0);
    load_raw(source, row.source, row.source_at, row.source_dtype, d, row.source ? width : 0);
    float value[K][N], place[K][N], of[K][N];
    widen(place, position, dtype);
    widen(of, type, dtype);
    widen(value, source, row.source_dtype);
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) value[k][i] = value[k][i] + (place[k][i] + of[k][i]);
    narrow(source, value, dtype);
    store_raw(out, at, source, dtype, d, width);
  }
}

// each(i, values) with N columns from d on of row i of n <= 32, or of the few after them, of which lane i knows which
// row of `rows` it is: `mine`, -1: zeros.
template <int N, class Each>
__device__ __forceinline__ void for_rows(const void* rows, Dtype dtype, int width, int d, int64_t mine, int n,
                                         Each&& each) {
  with_size<N>(dtype, [&](auto element) {
    const auto* from = as<decltype(element)>(rows);
    for (int i = 0; i < n; i += kTogether) {
      Raw<N> raw[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int64_t row = __shfl_sync(kAllLanes, mine, i + r);
        raw[r] = {};
        if (row >= 0 && d < width) get(raw[r], from + row * width + d);
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        float values[1][N];
        widen(values, {raw[r]}, dtype);
        each(i + r, values[0]);
      }
    }
  });
}

// Where a row of the output's gradient goes.
struct Move {
  int part;   // whose sum it joins, and which target it goes to; -1: no sum
  int row;    // of its target; -1: nowhere
  bool zero;  // it is not read: zeros go there
};

struct Target {
  void* rows;  // null: not wanted
  Dtype dtype;
};

struct MoveRows {
  const void* dout;   // [count, width]
  Partials partials;  // [chunks][parts][width]
  int64_t count, chunk;
  int width;
  Dtype dtype;
};

// where.of(t): the Move of row t; where.target(part): its target. Blocks: tiles of columns, chunks of rows.
template <int parts, int N, class Where>
__device__ __forceinline__ void move_rows(const MoveRows& a, const Where& where) {
  constexpr int kWarps = kMoveThreads / kWarp, kTile = kWarp * N;
  __shared__ float sums[kWarps][parts][kTile];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int d = static_cast<int>(blockIdx.x) * kTile + lane * N;
  const int64_t share = (a.chunk + kWarps - 1) / kWarps, begin = blockIdx.y * a.chunk, last = begin + a.chunk;
  const int64_t first = begin + warp * share, until = first + share < last ? first + share : last;
  const int64_t end = until < a.count ? until : a.count;
  float sum[parts][N] = {};
  for (int64_t start = first; start < end; start += kWarp) {
    const int n = end - start < kWarp ? static_cast<int>(end - start) : kWarp;
    const Move mine = lane < n ? where.of(start + lane) : Move{-1, -1, true};
    for_rows<N>(a.dout, a.dtype, a.width, d, mine.zero ? -1 : start + lane, n, [&](int i, const float(&values)[N]) {
      const int part = __shfl_sync(kAllLanes, mine.part, i), row = __shfl_sync(kAllLanes, mine.row, i);
      const Target target = where.target(part);
      if (target.rows && row >= 0) {
        Raw<N> moved[1];
        float copy[1][N];
#pragma unroll
        for (int c = 0; c < N; ++c) copy[0][c] = values[c];
        narrow(moved, copy, target.dtype);
        store_raw(target.rows, static_cast<int64_t>(row) * a.width, moved, target.dtype, d, a.width);
      }
#pragma unroll
      for (int p = 0; p < parts; ++p) {
        if (part != p) continue;
#pragma unroll
        for (int c = 0; c < N; ++c) sum[p][c] += values[c];
      }
    });
  }
  if (!a.partials.each) return;
#pragma unroll
  for (int p = 0; p < parts; ++p)
#pragma unroll
    for (int c = 0; c < N; ++c) sums[warp][p][lane * N + c] = sum[p][c];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < parts * kTile; i += kMoveThreads) {
    const int p = i / kTile, column = static_cast<int>(blockIdx.x) * kTile + i % kTile;
    float total = sums[0][p][i % kTile];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += sums[w][p][i % kTile];
    if (column < a.width) a.partials.each[(int64_t{blockIdx.y} * parts + p) * a.width + column] = total;
  }
  sum_partials<N>(a.partials, Tile{parts, a.width, static_cast<int>(blockIdx.x) * kTile, kTile}, blockIdx.y, gridDim.y,
                  a.partials.counters + blockIdx.x * sum_counters(gridDim.y));
}

// The gradient of a table: row g is the sum of the rows of dout that row(order[i]) names for i from starts[g] to
// starts[g + 1], in that order; -1 names none.
struct Groups {
  const void* dout;
  const int64_t* order;
  const int32_t* starts;
  void* out;
  int64_t groups;
  int width;
  Dtype dtype, out_dtype;
};

// Blocks: groups, tiles of columns.
template <int N, class Row>
__device__ __forceinline__ void sum_group(const Groups& a, const Row& row) {
  constexpr int kWarps = kGroupThreads / kWarp;
  __shared__ float sums[kWarps][N][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int d = (static_cast<int>(blockIdx.y) * kWarp + lane) * N;
  const int first = a.starts[blockIdx.x], last = a.starts[blockIdx.x + 1], share = (last - first + kWarps - 1) / kWarps;
  const int begin = first + warp * share, end = begin + share < last ? begin + share : last;
  float sum[1][N] = {};
  for (int start = begin; start < end; start += kWarp) {
    const int n = end - start < kWarp ? end - start : kWarp;
    const int64_t mine = lane < n ? row(a.order[start + lane]) : -1;
    for_rows<N>(a.dout, a.dtype, a.width, d, mine, n, [&](int, const float(&values)[N]) {
#pragma unroll
      for (int c = 0; c < N; ++c) sum[0][c] += values[c];
    });
  }
  if (first < last) {  // most rows of a vocabulary are in no batch
#pragma unroll
    for (int c = 0; c < N; ++c) sums[warp][c][lane] = sum[0][c];
    __syncthreads();
#pragma unroll
    for (int w = 1; w < kWarps; ++w)
#pragma unroll
      for (int c = 0; c < N; ++c) sum[0][c] += sums[w][c][lane];
  }
  if (warp != 0) return;
  Raw<N> out[1];
  narrow(out, sum, a.out_dtype);
  store_raw(a.out, int64_t{blockIdx.x} * a.width, out, a.out_dtype, d, a.width);
}

// function(Columns<N>{}) with the columns of these rows that a lane moves at a time.
template <class Function>
void with_columns(int64_t width, std::initializer_list<Rows> rows, Function&& function) {
  M3AE_CHECK(width < int64_t{1} << 30, "rows must have fewer than 2^30 columns, got ", width);
  const int columns = columns_a_lane(width, rows);
  if (columns == 8) function(Columns<8>{});
  else if (columns == 4) function(Columns<4>{});
  else function(Columns<1>{});
}

// Tiles of a launch: how many blocks share a row.
inline unsigned tiles(int64_t width, int columns) {
  return static_cast<unsigned>((width + kWarp * columns - 1) / (kWarp * columns));
}

}  // namespace m3ae::cuda
