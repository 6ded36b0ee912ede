// What varlen_attention's forward and backward share on a GPU: tiles in shared memory, their products, the way back.
//
// A tile holds rows of one head, kStride<D> elements apart, so that the eight rows of a matrix that ldmatrix reads lie
// in different banks. D is the head's width rounded up; channels past the width, and rows past the sequence up to the
// next sixteen, are zero. A warp owns sixteen rows of one side and meets the other side sixteen rows at a time: the
// scores between them never leave its registers.
#pragma once

#include <tuple>
#include <type_traits>

#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "ops/varlen_attention/varlen_attention.h"

namespace m3ae::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kRows = 16;

template <int D>
constexpr int kStride = D + 8;

__host__ __device__ __forceinline__ int tiles_of(int rows) { return (rows + kRows - 1) / kRows; }
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// Rows of a sequence.
struct Span {
  int first, count;
};
__device__ __forceinline__ Span span(const int32_t* cu, int sequence) {
  return {cu[sequence], cu[sequence + 1] - cu[sequence]};
}

// Where a lane points for ldmatrix, in a tile of such a stride.
__device__ __forceinline__ int lane_place(int stride) { return lane_of_warp() % 16 * stride + lane_of_warp() / 16 * 8; }

template <class T>
__device__ __forceinline__ T* row_of(const HeadRows& x, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + row * x.row + head * x.head;
}

// Begins to bring `rows` rows from global memory into a tile, and zeros up to `tiles` * 16 rows; copies_wait() and a
// barrier end it. packs: sixteen bytes at a time, else element by element.
template <int D, class T>
__device__ __forceinline__ void load_rows(T* tile, const T* from, int64_t stride, int rows, int tiles, int width,
                                          bool packs, int thread, int threads) {
  constexpr int kPacks = D / 8;
  const int rows_on = threads / kPacks, packs_on = threads % kPacks;  // from a thread's pack to its next
  int row = thread / kPacks, pack = thread % kPacks;
#pragma unroll 1
  while (row < tiles * kRows) {
    const int d = 8 * pack;
    T* to = tile + row * kStride<D> + d;
    const T* at = from + row * stride + d;
    if (packs) {
      const bool real = row < rows && d < width;
      copy16(to, real ? at : from, real);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) to[e] = row < rows && d + e < width ? at[e] : T{};
    }
    row += rows_on;
    if (kWarp % kPacks != 0) {  // else packs_on is 0
      pack += packs_on;
      row += pack >= kPacks;
      pack -= pack >= kPacks ? kPacks : 0;
    }
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

// Four words of each of four neighbouring lanes, transposed: word i of lane t becomes word t of lane i.
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
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
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

// Zeros in rows [first, end) of a head, by `blocks` blocks.
template <class T>
__device__ __forceinline__ void clear_rows(const HeadRows& x, int64_t head, int first, int64_t end, int width,
                                           int block, int blocks) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t row = first + block * warps + warp; row < end; row += blocks * warps)
    for (int d = lane_of_warp(); d < width; d += kWarp) row_of<T>(x, row, head)[d] = T{};
}

// On the host: (address, row stride, head stride), as Python hands tensors over.
using Strides = std::tuple<Address, int64_t, int64_t>;
inline HeadRows head_rows(const Strides& x) { return {pointer(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }

// Whether rows of all heads can be moved in packs of sixteen bytes.
inline bool in_packs(const HeadRows& x, int64_t width) {
  const auto bytes = static_cast<std::uintptr_t>(2 * (x.row | x.head | width));
  return (reinterpret_cast<std::uintptr_t>(x.data) | bytes) % 16 == 0;
}

// function(Type<T>{}, the width rounded up as an integral constant).
template <class Function>
void with_tile(Dtype dtype, int64_t width, Function&& function) {
  const auto with_width = [&](auto type) {
    if (width <= 32) return function(type, std::integral_constant<int, 32>{});
    if (width <= 64) return function(type, std::integral_constant<int, 64>{});
    if (width <= 80) return function(type, std::integral_constant<int, 80>{});
    if (width <= 96) return function(type, std::integral_constant<int, 96>{});
    M3AE_CHECK(width <= 128, "a head must be at most 128 channels wide, got ", width);
    function(type, std::integral_constant<int, 128>{});
  };
  if (dtype == Dtype::bf16) return with_width(Type<bfloat16>{});
  M3AE_CHECK(dtype == Dtype::f16, "dtype must be bfloat16 or float16, got code ", static_cast<int>(dtype));
  with_width(Type<float16>{});
}

}  // namespace m3ae::cuda
