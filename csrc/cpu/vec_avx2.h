// Vec of avx2: eight lanes.
#pragma once

#include <immintrin.h>

#include "cpu/lane.h"

namespace m3ae::M3AE_ISA {

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

M3AE_INLINE VecF32 operator/(VecF32 a, VecF32 b) { return {_mm256_div_ps(a.v, b.v)}; }
M3AE_INLINE VecF32 magnitude(VecF32 x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
M3AE_INLINE VecF32 where_negative(VecF32 x, VecF32 yes, VecF32 no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
}

}  // namespace m3ae::M3AE_ISA
