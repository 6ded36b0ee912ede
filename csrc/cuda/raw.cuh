// Rows whose dtype is known at run time: N neighbouring elements a lane, first as they lie in memory, then widened. The
// dtype is the same for a whole launch, so a branch on it costs nothing; what is widened elsewhere than where it is
// loaded lets the loads of several rows be under way together, in any mix of dtypes, without a kernel for each.
#pragma once

#include "cuda/numbers.cuh"

namespace m3ae::cuda {

// A 16-bit type fills the first half of the words; N = 1: the low half of one.
template <int N>
struct Raw {
  uint32_t words[N];

  __device__ __forceinline__ uint16_t half(int i) const { return static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)); }
};

// T: float or uint16_t, for the dtypes of that size.
template <int N, class T>
__device__ __forceinline__ void get(Raw<N>& to, const T* from) {
  const Pack<T, N> elements = load<N>(from);
  memcpy(to.words, elements.at, sizeof(elements.at));
}

template <int N, class T>
__device__ __forceinline__ void put(T* to, const Raw<N>& from) {
  Pack<T, N> elements;
  memcpy(elements.at, from.words, sizeof(elements.at));
  store(to, elements);
}

// Columns first + k * kWarp * N of a row; those from width on are zero. N = 4: width and address are multiples of 4.
template <int N, int K>
__device__ __forceinline__ void load_raw(Raw<N> (&to)[K], const void* from, int64_t row, Dtype dtype, int first,
                                         int width) {
  const auto each = [&](auto* at) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int d = first + k * kWarp * N;
      to[k] = {};
      if (d < width) get(to[k], at + d);
    }
  };
  if (dtype == Dtype::f32) each(as<float>(from) + row);
  else each(as<uint16_t>(from) + row);
}

template <int N, int K>
__device__ __forceinline__ void store_raw(void* to, int64_t row, const Raw<N> (&from)[K], Dtype dtype, int first,
                                          int width) {
  const auto each = [&](auto* at) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int d = first + k * kWarp * N;
      if (d < width) put(at + d, from[k]);
    }
  };
  if (dtype == Dtype::f32) each(as<float>(to) + row);
  else each(as<uint16_t>(to) + row);
}

template <int N, int K>
__device__ __forceinline__ void widen(float (&to)[K][N], const Raw<N> (&from)[K], Dtype dtype) {
  const auto each = [&](auto element) {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) to[k][i] = element(from[k], i);
  };
  if (dtype == Dtype::f32) each([](const Raw<N>& raw, int i) { return float_of(raw.words[i]); });
  else if (dtype == Dtype::bf16) each([](const Raw<N>& raw, int i) { return widen(bfloat16{raw.half(i)}); });
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
  if (dtype == Dtype::bf16) return each([](float x) { return narrow<bfloat16>(x).bits; });
  if (dtype == Dtype::f16) return each([](float x) { return narrow<float16>(x).bits; });
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) to[k].words[i] = bits_of(from[k][i]);
}

// On the host: whether rows at all these addresses, null or not, can be moved four columns at a time.
template <class... Addresses>
bool in_fours(int64_t width, Addresses... addresses) {
  return width % 4 == 0 && ((reinterpret_cast<std::uintptr_t>(addresses) % 16 == 0) && ...);
}

}  // namespace m3ae::cuda
