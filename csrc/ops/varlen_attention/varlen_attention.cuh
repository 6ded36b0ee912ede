// What varlen_attention's forward and backward share on a GPU: tiles in shared memory, their products, the way back.
//
// A tile holds rows of one head, kStride<D> elements apart, so that the eight rows of a matrix that ldmatrix reads lie
// in different banks. D is the head's width rounded up; channels past the width, and rows past the sequence up to the
// next sixteen, are zero. A warp owns sixteen rows of one side and meets the other side sixteen rows at a time: the
// scores between them never leave its registers.
#pragma once

#include <type_traits>

#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "ops/varlen_attention/arguments.h"
#include "ops/varlen_attention/schedule.cuh"

namespace m3ae::cuda {

constexpr double kLog2e = 1.4426950408889634;

// Weights are 2^((score - peak) * factor): the difference comes first, and is exact where it matters, however large the
// scores are. Scores are halves, which no two are too far apart for, with the sign of the scale. A row whose scores are
// all -inf has a total of 0, which makes it NaN as in eager PyTorch: peaks start at the lowest finite number.
struct Scale {
  float direction, factor;  // what makes a product a score; 0 and 1 for a scale that is 0 in fp32

  explicit Scale(double scale)
      : direction(scale < 0 ? -0.5f : 0.5f), factor(static_cast<float>(std::abs(scale) * 2 * kLog2e)) {
    if (factor == 0) direction = 0, factor = 1;
  }
  Scale() = default;
};
template <int D>
constexpr int kStride = D + 8;

// Where a lane points for ldmatrix, in a tile of such a stride.
__device__ __forceinline__ int lane_place(int stride) { return lane_of_warp() % 16 * stride + lane_of_warp() / 16 * 8; }

template <class T>
__device__ __forceinline__ T* row_of(const HeadRows& x, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + row * x.row + head * x.head;
}

// Begins to bring a tile's rows from global memory, the first `rows` of them, zeros after these. By a whole warp;
// waiting for copies and a barrier end it. packs: sixteen bytes at a time, else element by element.
template <int D, class T>
__device__ __forceinline__ void load_tile(T* tile, const HeadRows& x, int64_t row, int64_t head, int rows, int width,
                                          bool packs) {
  constexpr int kPacks = D / 8;
  const T* from = row_of<const T>(x, row, head);
  const int lane = here(lane_of_warp());
  if (!packs) {
#pragma unroll 1
    for (int place = lane; place < kRows * D; place += kWarp) {
      const int r = place / D, d = place % D;
      tile[r * kStride<D> + d] = r < rows && d < width ? from[r * x.row + d] : T{};
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRows * kPacks / kWarp; ++i) {
    const int place = i * kWarp + lane, r = place / kPacks, d = place % kPacks * 8;
    const bool real = r < rows && d < width;
    copy16(tile + r * kStride<D> + d, real ? from + r * x.row + d : x.data, real);
  }
}

// Sixteen rows as the left factor of products: held in registers, or read anew where sums fill those.
template <class T, int D, bool kHeld>
class Own {
 public:
  __device__ __forceinline__ explicit Own(const T* tile) : place_(tile + lane_place(kStride<D>)) {
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) load_matrices(held_[k], place_ + 16 * k);
    }
  }

  // sums[n] = own rows * other rows 8n to 8n + 7, transposed; other: where this lane points in their tile.
  __device__ __forceinline__ void product(float (&sums)[2][4], const T* other) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t right[4];
      load_matrices(right, other + 16 * k);
      if constexpr (kHeld) {
        multiply(sums, held_[k], right);
      } else {
        uint32_t left[4];
        load_matrices(left, place_ + 16 * k);
        multiply(sums, left, right);
      }
    }
  }

 private:
  __device__ __forceinline__ static void multiply(float (&sums)[2][4], const uint32_t (&left)[4],
                                                  const uint32_t (&right)[4]) {
    mma<T>(sums[0], left, right[0], right[2]);
    mma<T>(sums[1], left, right[1], right[3]);
  }

  const T* place_;
  uint32_t held_[kHeld ? D / 16 : 1][4];
};

// A 16 x 16 block of sums, rounded to T.
template <class T>
__device__ __forceinline__ void as_left(uint32_t (&left)[4], const float (&sums)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = two<T>(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
}

// sums += left * other rows; other: where this lane points in their tile.
template <class T, int D>
__device__ __forceinline__ void add_product(float (&sums)[D / 8][4], const uint32_t (&left)[4], const T* other) {
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
    uint32_t right[4];
    load_matrices_transposed(right, other + 16 * d);
    mma<T>(sums[2 * d], left, right[0], right[1]);
    mma<T>(sums[2 * d + 1], left, right[2], right[3]);
  }
}

template <int D>
__device__ __forceinline__ void clear(float (&sums)[D / 8][4]) {
#pragma unroll
  for (int d = 0; d < D / 8; ++d)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[d][i] = 0;
}

// Four words of each of four neighboring lanes, transposed: word i of lane t becomes word t of lane i.
__device__ __forceinline__ void transpose_by_four(Pack<uint32_t, 4>& words) {
#pragma unroll
  for (int with = 1; with <= 2; with *= 2) {
    const bool upper = lane_of_warp() & with;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& low = words.at[with == 1 ? 2 * i : i];
      uint32_t& high = words.at[with == 1 ? 2 * i + 1 : i + 2];
      const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? low : high, with);
      low = upper ? got : low;
      high = upper ? high : got;
    }
  }
}

// The first `rows` of a warp's sixteen rows of sums, times factors[0] for rows 0 to 7 and factors[1] for the others,
// to global memory. By the whole warp.
template <class T, int D>
__device__ __forceinline__ void store_rows(const float (&sums)[D / 8][4], const float (&factors)[2], T* to,
                                           int64_t stride, int rows, int width, bool packs) {
  const int lane = here(lane_of_warp()), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = to + (g + 8 * half) * stride;
    const int end = g + 8 * half < rows ? width : 0;
    const auto pair = [&](int n) {
      return two<T>(sums[n][2 * half] * factors[half], sums[n][2 * half + 1] * factors[half]);
    };
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) {
      if (packs && n + 4 <= D / 8) {  // a lane's pairs of four blocks of columns: together, one block of the row
        Pack<uint32_t, 4> words{{pair(n), pair(n + 1), pair(n + 2), pair(n + 3)}};
        transpose_by_four(words);
        if (8 * (n + t) < end) store(reinterpret_cast<uint32_t*>(row + 8 * (n + t)), words);
        continue;
      }
#pragma unroll
      for (int i = n; i < n + 4 && i < D / 8; ++i) {
        const uint32_t both = pair(i);
        const int d = 8 * i + 2 * t;
        if (d < end) row[d].bits = static_cast<uint16_t>(both);
        if (d + 1 < end) row[d + 1].bits = static_cast<uint16_t>(both >> 16);
      }
    }
  }
}

// Zeros in rows [first, end) of a head, by the whole grid.
template <class T>
__device__ __forceinline__ void clear_rows(const HeadRows& x, int64_t head, int first, int64_t end, int width) {
  const int64_t warps = warps_of_block(), warp = warp_of_block();
  for (int64_t row = first + blockIdx.x * warps + warp; row < end; row += gridDim.x * warps)
    for (int d = lane_of_warp(); d < width; d += kWarp) row_of<T>(x, row, head)[d] = T{};
}

// Whether rows of all heads can be moved in packs of sixteen bytes.
inline bool in_packs(const HeadRows& x, int64_t width) {
  const auto bytes = static_cast<std::uintptr_t>(2 * (x.row | x.head | width));
  return (reinterpret_cast<std::uintptr_t>(x.data) | bytes) % 16 == 0;
}

// Dynamic shared memory that a block may have, by the limit of a block's: alone on a processor, and where two fit. (The
// GPU keeps 1 KB of each for itself, which the limit is without.)
inline int64_t most_shared(int64_t limit) { return limit - kStaticShared; }
inline int64_t half_shared(int64_t limit) { return (limit + 1024) / 2 - 1024 - kStaticShared; }

// There is no order where all sequences are as long as the longest, as far as the host can tell.
inline Lengths lengths(const Tensor& cu_q, const Tensor& cu_k, int64_t heads, int64_t max_q, int64_t query_rows,
                       int64_t max_k, int64_t key_rows) {
  const int64_t sequences = cu_q.size(0) - 1;
  const bool equal = max_q * sequences == query_rows && max_k * sequences == key_rows;
  const bool sorted = !equal && sequences <= kMostSorted;
  const int32_t* queries = cu_q.int32s("cu_seqlens_q", {sequences + 1});
  return {queries, cu_k ? cu_k.int32s("cu_seqlens_k", {sequences + 1}) : queries, static_cast<int>(sequences),
          static_cast<int>(heads), 0, 1, sorted ? static_cast<int>(sequences + 7) / 8 * 16 : 0};
}

// As many blocks as a GPU holds at a time, or as there are turns.
template <class... Args>
void launch_turns(const char* name, void (*kernel)(Args...), const Lengths& lengths, int warps, size_t shared,
                  const Stream& stream, const typename Plain<Args>::type&... args) {
  const int64_t turns = int64_t{lengths.sequences} * lengths.heads * lengths.pieces;
  M3AE_CHECK(turns < int64_t{1} << 31, "sequences times heads must be less than 2^31, got ", turns);
  const int64_t most = blocks_at_a_time(name, kernel, warps * kWarp, shared, stream);
  launch(name, kernel, grid(std::max<int64_t>(1, std::min(turns, most))), warps * kWarp, shared, stream, args...);
}

// function(Type<T>{}, the width rounded up as an integral constant).
template <class Function>
void with_tile(Dtype dtype, int64_t width, Function&& function) {
  const auto with_width = [&](auto type) {
    if (width <= 32) return function(type, std::integral_constant<int, 32>{});
    if (width <= 64) return function(type, std::integral_constant<int, 64>{});
    if (width <= 80) return function(type, std::integral_constant<int, 80>{});
    M3AE_CHECK(width <= 128, "a head must be at most 128 channels wide, got ", width);
    function(type, std::integral_constant<int, 128>{});
  };
  if (dtype == Dtype::bf16) return with_width(Type<bfloat16>{});
  M3AE_CHECK(dtype == Dtype::f16, "dtype must be bfloat16 or float16, got code ", static_cast<int>(dtype));
  with_width(Type<float16>{});
}

}  // namespace m3ae::cuda
