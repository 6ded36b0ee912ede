// Vec of avx512: sixteen lanes.
#pragma once

#include <immintrin.h>

#include "cpu/lane.h"

namespace m3ae::M3AE_ISA {

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

M3AE_INLINE VecF32 operator/(VecF32 a, VecF32 b) { return {_mm512_div_ps(a.v, b.v)}; }
M3AE_INLINE VecF32 magnitude(VecF32 x) { return {_mm512_abs_ps(x.v)}; }
M3AE_INLINE VecF32 where_negative(VecF32 x, VecF32 yes, VecF32 no) {
  return {_mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), yes.v)};
}

}  // namespace m3ae::M3AE_ISA
