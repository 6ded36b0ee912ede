// Rows whose dtype is known at run time: N neighboring elements a lane, first as they lie in memory, then widened. The
// dtype is the same for a whole launch, so a branch on it costs nothing; what is widened elsewhere than where it is
// loaded lets the loads of several rows be under way together, in any mix of dtypes, without a kernel for each.
//
// A lane moves sixteen bytes at a time, so N = 8 is for 16-bit rows alone and N = 4 for any mix. Beside fp32 rows one
// could move 16-bit ones in eights, too, but a lane's eight floats take two instructions, each of which fills half of
// each 32-byte sector that it stores to; in fours both types fill theirs.
#pragma once

#include <initializer_list>

#include "cuda/numbers.cuh"

namespace m3ae::cuda {

template <int N>
constexpr bool kMaybeFloat = N * sizeof(float) <= 16;

// A 16-bit type fills the first half of the words, where fp32 needs them all; N = 1: the low half of one.
template <int N>
struct Raw {
  uint32_t words[kMaybeFloat<N> ? N : N / 2];

  __device__ __forceinline__ uint16_t half(int i) const { return static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)); }
};

// T: float or uint16_t, for the dtypes of that size.
template <int N, class T>
__device__ __forceinline__ void get(Raw<N>& to, const T* from) {
  const Pack<T, N> elements = load<N>(from);
  memcpy(to.words, elements.at, sizeof(elements.at));
}

template <int N, class T>
__device__ __forceinline__ void put(T* to, int64_t at, const Raw<N>& from) {
  Pack<T, N> elements;
  memcpy(elements.at, from.words, sizeof(elements.at));
  store_at(to, at, elements);
}

// function(element) with one of the dtype's size.
template <int N, class Function>
__device__ __forceinline__ void with_size(Dtype dtype, Function&& function) {
  if constexpr (kMaybeFloat<N>) {
    if (dtype == Dtype::f32) return function(float{});
  }
  function(uint16_t{});
}

// Columns first + k * kWarp * N of a row; those from width on are zero.
template <int N, int K>
__device__ __forceinline__ void load_raw(Raw<N> (&to)[K], const void* from, int64_t row, Dtype dtype, int first,
                                         int width) {
  with_size<N>(dtype, [&](auto element) {
    const auto* at = as<decltype(element)>(from) + row;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int d = first + k * kWarp * N;
      to[k] = {};
      if (d < width) get(to[k], at + d);
    }
  });
}

template <int N, int K>
__device__ __forceinline__ void store_raw(void* to, int64_t row, const Raw<N> (&from)[K], Dtype dtype, int first,
                                          int width) {
  with_size<N>(dtype, [&](auto element) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int d = first + k * kWarp * N;
      if (d < width) put(as<decltype(element)>(to), row + d, from[k]);
    }
  });
}

template <int N, int K>
__device__ __forceinline__ void widen(float (&to)[K][N], const Raw<N> (&from)[K], Dtype dtype) {
  const auto each = [&](auto element) {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) to[k][i] = element(from[k], i);
  };
  if constexpr (kMaybeFloat<N>) {
    if (dtype == Dtype::f32) return each([](const Raw<N>& raw, int i) { return float_of(raw.words[i]); });
  }
  if (dtype == Dtype::bf16) each([](const Raw<N>& raw, int i) { return widen(bfloat16{raw.half(i)}); });
  else each([](const Raw<N>& raw, int i) { return widen(float16{raw.half(i)}); });
}

template <int N, int K>
__device__ __forceinline__ void narrow(Raw<N> (&to)[K], const float (&from)[K][N], Dtype dtype) {
  const auto each = [&](auto bits) {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const uint32_t low = bits(from[k][i]);
        to[k].words[i / 2] = N == 1 ? low : low | static_cast<uint32_t>(bits(from[k][i + 1 < N ? i + 1 : i])) << 16;
      }
  };
  if constexpr (kMaybeFloat<N>) {
    if (dtype == Dtype::f32) {
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < N; ++i) to[k].words[i] = bits_of(from[k][i]);
      return;
    }
  }
  if (dtype == Dtype::bf16) each([](float x) { return narrow<bfloat16>(x).bits; });
  else each([](float x) { return narrow<float16>(x).bits; });
}

// On the host: rows of a launch; null: none, of which nothing is asked.
struct Rows {
  const void* address;
  Dtype dtype;
};

// How many columns a lane can move at a time of all these rows: 8, 4 or 1.
inline int columns_a_lane(int64_t width, std::initializer_list<Rows> all) {
  for (const int columns : {8, 4}) {
    bool fit = width % columns == 0;
    for (const Rows& rows : all) {
      const auto bytes = static_cast<std::uintptr_t>(columns * size_of(rows.dtype));
      const bool aligned = bytes <= 16 && reinterpret_cast<std::uintptr_t>(rows.address) % bytes == 0;
      fit = fit && (aligned || !rows.address);
    }
    if (fit) return columns;
  }
  return 1;
}

template <int N>
using Columns = std::integral_constant<int, N>;

}  // namespace m3ae::cuda
