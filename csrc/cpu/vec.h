// Vec: a register of fp32 lanes, one spelling per instruction set. Kernels are written on it once.
//   loads and stores convert from and to float, bfloat16 (round to nearest even) and uint8 (load only);
//   *_first(n) touch only the first n lanes; max returns its second operand where one is NaN.
// Vec<double> (one lane) lets fp64 run through the same kernels.
// Everything here sits inside m3ae::M3AE_ISA: a function shared between instruction sets could be linked from the
// wrong one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtype.h"

#ifdef M3AE_X86
#include <immintrin.h>
#endif

#define M3AE_INLINE inline __attribute__((always_inline))

namespace m3ae::M3AE_ISA {

M3AE_INLINE float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
M3AE_INLINE bfloat16 narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};  // NaN stays NaN, as in PyTorch
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// One lane: fp64 everywhere, and fp32 on the scalar instruction set, where the compiler vectorises the loop itself.
template <class Float>
struct Lane {
  static constexpr int width = 1;
  using scalar = Float;
  Float v;

  static M3AE_INLINE Lane set(Float x) { return {x}; }
  static M3AE_INLINE Lane zero() { return {Float(0)}; }
  static M3AE_INLINE Lane load(const float* p) { return {static_cast<Float>(*p)}; }
  static M3AE_INLINE Lane load(const double* p) { return {static_cast<Float>(*p)}; }
  static M3AE_INLINE Lane load(const bfloat16* p) { return {static_cast<Float>(widen(*p))}; }
  static M3AE_INLINE Lane load(const uint8_t* p) { return {static_cast<Float>(*p)}; }
  template <class T>
  static M3AE_INLINE Lane load_first(const T* p, int n) { return n > 0 ? load(p) : zero(); }
  M3AE_INLINE void store(float* p) const { *p = static_cast<float>(v); }
  M3AE_INLINE void store(double* p) const { *p = static_cast<double>(v); }
  M3AE_INLINE void store(bfloat16* p) const { *p = narrow(static_cast<float>(v)); }
  template <class T>
  M3AE_INLINE void store_first(T* p, int n) const { if (n > 0) store(p); }

  M3AE_INLINE Lane operator+(Lane b) const { return {v + b.v}; }
  M3AE_INLINE Lane operator-(Lane b) const { return {v - b.v}; }
  M3AE_INLINE Lane operator*(Lane b) const { return {v * b.v}; }
  static M3AE_INLINE Lane fma(Lane a, Lane b, Lane c) { return {a.v * b.v + c.v}; }  // two roundings without hardware
  static M3AE_INLINE Lane max(Lane a, Lane b) { return {a.v > b.v ? a.v : b.v}; }
  M3AE_INLINE Float sum() const { return v; }
  M3AE_INLINE Float largest() const { return v; }
  M3AE_INLINE Lane first_or(int n, Lane other) const { return n > 0 ? *this : other; }
  static M3AE_INLINE void transpose(Lane (&)[width]) {}
  static M3AE_INLINE void interleave3(Lane a, Lane b, Lane c, Lane (&out)[3]) { out[0] = a, out[1] = b, out[2] = c; }
};

// interleave3: three planes to pixels, out = a0 b0 c0 a1 b1 c1 ... over three vectors. Lane i of vector k holds lane
// (width * k + i) / 3 of a plane; which plane says the mask of a blend.
template <int width>
struct PixelOfLane {
  int32_t of[3][width] = {};
  constexpr PixelOfLane() {
    for (int i = 0; i < 3 * width; ++i) of[i / width][i % width] = i / 3;
  }
};

#if defined(M3AE_ISA_avx512) || defined(M3AE_ISA_avx512_bf16)

struct VecF32 {
  static constexpr int width = 16;
  using scalar = float;
  __m512 v;

  static M3AE_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }  // 0 <= n <= 16
  static M3AE_INLINE VecF32 set(float x) { return {_mm512_set1_ps(x)}; }
  static M3AE_INLINE VecF32 zero() { return {_mm512_setzero_ps()}; }
  static M3AE_INLINE __m512 widened(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static M3AE_INLINE VecF32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static M3AE_INLINE VecF32 load(const bfloat16* p) { return {widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static M3AE_INLINE VecF32 load(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static M3AE_INLINE VecF32 load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static M3AE_INLINE VecF32 load_first(const bfloat16* p, int n) { return {widened(_mm256_maskz_loadu_epi16(first(n), p))}; }
  static M3AE_INLINE VecF32 load_first(const uint8_t* p, int n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
  }
  M3AE_INLINE __m256i narrowed() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
  }
  M3AE_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  M3AE_INLINE void store(bfloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed()); }
  M3AE_INLINE void store_first(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  M3AE_INLINE void store_first(bfloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrowed()); }

  M3AE_INLINE VecF32 operator+(VecF32 b) const { return {_mm512_add_ps(v, b.v)}; }
  M3AE_INLINE VecF32 operator-(VecF32 b) const { return {_mm512_sub_ps(v, b.v)}; }
  M3AE_INLINE VecF32 operator*(VecF32 b) const { return {_mm512_mul_ps(v, b.v)}; }
  static M3AE_INLINE VecF32 fma(VecF32 a, VecF32 b, VecF32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static M3AE_INLINE VecF32 max(VecF32 a, VecF32 b) { return {_mm512_max_ps(a.v, b.v)}; }
  M3AE_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  M3AE_INLINE float largest() const { return _mm512_reduce_max_ps(v); }
  M3AE_INLINE VecF32 first_or(int n, VecF32 other) const { return {_mm512_mask_mov_ps(other.v, first(n), v)}; }

  M3AE_INLINE VecF32 rounded() const {
    return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  M3AE_INLINE VecF32 times_two_to(VecF32 n) const { return {_mm512_scalef_ps(v, n.v)}; }
  static constexpr float lowest_exponent = -160.0f;  // 2^-160 rounds to 0

  static M3AE_INLINE void transpose(VecF32 (&r)[width]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
      t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    __m512d u[16];
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
        u[i + 2 * j] = _mm512_unpacklo_pd(a, b);
        u[i + 2 * j + 1] = _mm512_unpackhi_pd(a, b);
      }
    for (int j = 0; j < 4; ++j) {  // u[4 i + j]: columns j, j + 4, j + 8, j + 12 of rows 4 i .. 4 i + 3
      const __m512 a = _mm512_castpd_ps(u[j]), b = _mm512_castpd_ps(u[4 + j]);
      const __m512 c = _mm512_castpd_ps(u[8 + j]), d = _mm512_castpd_ps(u[12 + j]);
      const __m512 ab_even = _mm512_shuffle_f32x4(a, b, 0x88), ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
      const __m512 cd_even = _mm512_shuffle_f32x4(c, d, 0x88), cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
      r[j].v = _mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
      r[4 + j].v = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
      r[8 + j].v = _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
      r[12 + j].v = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
    }
  }

  template <int b_lanes, int c_lanes>
  static M3AE_INLINE VecF32 pixels(const int32_t* of, VecF32 a, VecF32 b, VecF32 c) {
    const __m512i pixel = _mm512_loadu_si512(of);
    const __m512 ab = _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(pixel, a.v), b_lanes, pixel, b.v);
    return {_mm512_mask_permutexvar_ps(ab, c_lanes, pixel, c.v)};
  }
  static M3AE_INLINE void interleave3(VecF32 a, VecF32 b, VecF32 c, VecF32 (&out)[3]) {
    static constexpr PixelOfLane<width> pixel;
    out[0] = pixels<0x2492, 0x4924>(pixel.of[0], a, b, c);
    out[1] = pixels<0x9249, 0x2492>(pixel.of[1], a, b, c);
    out[2] = pixels<0x4924, 0x9249>(pixel.of[2], a, b, c);
  }
};

#elif defined(M3AE_ISA_avx2)

struct VecF32 {
  static constexpr int width = 8;
  using scalar = float;
  __m256 v;

  static M3AE_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static M3AE_INLINE VecF32 set(float x) { return {_mm256_set1_ps(x)}; }
  static M3AE_INLINE VecF32 zero() { return {_mm256_setzero_ps()}; }
  static M3AE_INLINE VecF32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static M3AE_INLINE VecF32 load(const bfloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static M3AE_INLINE VecF32 load(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static M3AE_INLINE VecF32 load_first(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
  template <class T>
  static M3AE_INLINE VecF32 load_first(const T* p, int n) {
    T copy[width] = {};
    std::memcpy(copy, p, static_cast<size_t>(n) * sizeof(T));
    return load(copy);
  }
  M3AE_INLINE __m128i narrowed() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    return _mm256_castsi256_si128(packed);
  }
  M3AE_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  M3AE_INLINE void store(bfloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed()); }
  M3AE_INLINE void store_first(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  M3AE_INLINE void store_first(bfloat16* p, int n) const {
    bfloat16 copy[width];
    store(copy);
    std::memcpy(p, copy, static_cast<size_t>(n) * sizeof(bfloat16));
  }

  M3AE_INLINE VecF32 operator+(VecF32 b) const { return {_mm256_add_ps(v, b.v)}; }
  M3AE_INLINE VecF32 operator-(VecF32 b) const { return {_mm256_sub_ps(v, b.v)}; }
  M3AE_INLINE VecF32 operator*(VecF32 b) const { return {_mm256_mul_ps(v, b.v)}; }
  static M3AE_INLINE VecF32 fma(VecF32 a, VecF32 b, VecF32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static M3AE_INLINE VecF32 max(VecF32 a, VecF32 b) { return {_mm256_max_ps(a.v, b.v)}; }
  M3AE_INLINE float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  M3AE_INLINE float largest() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  M3AE_INLINE VecF32 first_or(int n, VecF32 other) const {
    return {_mm256_blendv_ps(other.v, v, _mm256_castsi256_ps(first(n)))};
  }

  M3AE_INLINE VecF32 rounded() const { return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  M3AE_INLINE VecF32 times_two_to(VecF32 n) const {  // flushes what falls below 2^-126 to 0
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    const __m256i bounded = _mm256_min_epi32(_mm256_max_epi32(biased, _mm256_setzero_si256()), _mm256_set1_epi32(255));
    return {_mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(bounded, 23)))};
  }
  static constexpr float lowest_exponent = -127.0f;

  static M3AE_INLINE void transpose(VecF32 (&r)[width]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
      t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
        u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
      }
    for (int j = 0; j < 4; ++j) {
      r[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
      r[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
    }
  }

  template <int b_lanes, int c_lanes>
  static M3AE_INLINE VecF32 pixels(const int32_t* of, VecF32 a, VecF32 b, VecF32 c) {
    const __m256i pixel = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(of));
    const __m256 ab = _mm256_blend_ps(_mm256_permutevar8x32_ps(a.v, pixel), _mm256_permutevar8x32_ps(b.v, pixel), b_lanes);
    return {_mm256_blend_ps(ab, _mm256_permutevar8x32_ps(c.v, pixel), c_lanes)};
  }
  static M3AE_INLINE void interleave3(VecF32 a, VecF32 b, VecF32 c, VecF32 (&out)[3]) {
    static constexpr PixelOfLane<width> pixel;
    out[0] = pixels<0x92, 0x24>(pixel.of[0], a, b, c);
    out[1] = pixels<0x24, 0x49>(pixel.of[1], a, b, c);
    out[2] = pixels<0x49, 0x92>(pixel.of[2], a, b, c);
  }
};

#else
using VecF32 = Lane<float>;
#endif

// The vector that accumulates elements of type T: fp32 lanes, but fp64 for double.
template <class T>
struct vec_of { using type = VecF32; };
template <>
struct vec_of<double> { using type = Lane<double>; };
template <class T>
using Vec = typename vec_of<T>::type;

// 2^x within 1 ulp; 2^-inf is 0, NaN stays NaN. x must not pass 128 by much.
template <class V>
M3AE_INLINE V exp2(V x) {
  if constexpr (V::width == 1) {
    return {std::exp2(x.v)};
  } else {
    x = V::max(V::set(V::lowest_exponent), x);  // in this order: max returns its second operand where one is NaN
    const V n = x.rounded(), f = x - n;
    V p = V::set(0x1.41d332p-13f);  // minimax over [-0.5, 0.5], relative error 1.9e-9 before rounding
    p = V::fma(p, f, V::set(0x1.5f456ap-10f));
    p = V::fma(p, f, V::set(0x1.3b2dbcp-7f));
    p = V::fma(p, f, V::set(0x1.c6aed4p-5f));
    p = V::fma(p, f, V::set(0x1.ebfbdap-3f));
    p = V::fma(p, f, V::set(0x1.62e430p-1f));
    p = V::fma(p, f, V::set(1.0f));
    return p.times_two_to(n);
  }
}

// body(offset, n) over [0, count): whole vectors first (n == V::width), then the rest.
template <class V, class Body>
M3AE_INLINE void for_lanes(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) body(i, V::width);
  if (i < count) body(i, static_cast<int>(count - i));
}
template <class V, class T>
M3AE_INLINE V load_lanes(const T* p, int n) { return n == V::width ? V::load(p) : V::load_first(p, n); }
template <class V, class T>
M3AE_INLINE void store_lanes(const V& x, T* p, int n) { if (n == V::width) x.store(p); else x.store_first(p, n); }

}  // namespace m3ae::M3AE_ISA
