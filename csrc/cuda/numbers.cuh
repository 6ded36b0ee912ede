// Element types on a GPU: widened to float to compute, narrowed to the nearest to store, moved sixteen bytes at a time.
#pragma once

#include <cstring>

#include "cuda/launch.cuh"

namespace m3ae::cuda {

__host__ __device__ __forceinline__ uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

__host__ __device__ __forceinline__ float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(uint8_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float widen(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

#ifdef M3AE_EMULATED

inline float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return float_of(sign | 0x7F800000u | (rest & 0x3FF) << 13);
  const float scale = 0x1p112f;  // a subnormal's value, too, comes out of one product
  return float_of(sign | bits_of(float_of(rest << 13) * scale));
}

// The 16 bits nearest to x, ties to even, of a format with so many mantissa bits (its exponents those of float).
inline uint16_t nearest_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint16_t nearest_fp16(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (size != size) return 0x7FFF;
  if (size >= 65520.f) return static_cast<uint16_t>(sign | 0x7C00);
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p24f)));
  const uint32_t bits = bits_of(size) - (112u << 23);
  return static_cast<uint16_t>(sign | (bits + 0xFFF + (bits >> 13 & 1)) >> 13);
}

inline void narrow(float x, bfloat16& out) { out.bits = nearest_bf16(x); }
inline void narrow(float x, float16& out) { out.bits = nearest_fp16(x); }

#else

__device__ __forceinline__ float widen(float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
__device__ __forceinline__ void narrow(float x, bfloat16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}
__device__ __forceinline__ void narrow(float x, float16& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}

#endif

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }

template <class T>
__device__ __forceinline__ T narrow(float x) {
  T out;
  narrow(x, out);
  return out;
}

// N elements that lie side by side: instructions of up to sixteen bytes load or store them.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
#ifdef M3AE_EMULATED
  if (reinterpret_cast<std::uintptr_t>(from) % alignof(Pack<T, N>)) throw std::logic_error("a load is not aligned");
#endif
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& values) {
#ifdef M3AE_EMULATED
  if (reinterpret_cast<std::uintptr_t>(to) % alignof(Pack<T, N>)) throw std::logic_error("a store is not aligned");
#endif
  if constexpr (sizeof(values) == 16) {  // element by element it takes more registers
    uint4 words;
    memcpy(&words, values.at, 16);
    *reinterpret_cast<uint4*>(to) = words;
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = values;
  }
}

// At to + at, a multiple of N. An address that is counted in packs lets the compiler see what it may store whole.
template <class T, int N>
__device__ __forceinline__ void store_at(T* to, int64_t at, const Pack<T, N>& values) {
#ifdef M3AE_EMULATED
  if (at % N || reinterpret_cast<std::uintptr_t>(to) % alignof(Pack<T, N>))
    throw std::logic_error("a store is not aligned");
#endif
  reinterpret_cast<Pack<T, N>*>(to)[static_cast<uint64_t>(at) / N] = values;
}

// x * a + b, rounded twice, as PyTorch does it.
__device__ __forceinline__ float multiply_add(float x, float a, float b) { return __fadd_rn(__fmul_rn(x, a), b); }

template <class T>
struct Type {
  using type = T;
};

// function(Type<T>{}) with the type of a floating dtype that a GPU takes.
template <class Function>
void with_float(Dtype dtype, Function&& function) {
  if (dtype == Dtype::f32) return function(Type<float>{});
  if (dtype == Dtype::bf16) return function(Type<bfloat16>{});
  M3AE_CHECK(dtype == Dtype::f16, "dtype must be float32, bfloat16 or float16, got code ", static_cast<int>(dtype));
  function(Type<float16>{});
}

}  // namespace m3ae::cuda
