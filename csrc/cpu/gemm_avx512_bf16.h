// Products of avx512_bf16: two bf16 neighbors along k are one unit, which VDPBF16PS multiplies and adds at once.
#pragma once

#include "cpu/units.h"

namespace m3ae::M3AE_ISA {

constexpr int kTileVectors = 4;  // 32 registers

struct Pair {
  bfloat16 low, high;  // k even, k odd
};
using Bf16Unit = Pair;

template <>
struct Units<Pair> {
  static constexpr int depth = 2;
  using V = VecF32;
  using Register = __m512i;
  static M3AE_INLINE Register set(const Pair* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
  }
  static M3AE_INLINE Register load(const Pair* p) { return _mm512_loadu_si512(p); }
  static M3AE_INLINE V dot(Register a, Register b, V c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
  // Relative error 9e-5, where rounding to bf16 adds up to 4e-3; none at whole x. 2^-inf is 0, NaN stays NaN.
  static M3AE_INLINE V exp2(V x) {
    const V f{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // x - floor(x), 0 at -inf
    V p = V::set(0x1.3baadcp-4f);  // minimax over [0, 1] among those that are 1 at 0
    p = V::fma(p, f, V::set(0x1.d23788p-3f));
    p = V::fma(p, f, V::set(0x1.63e654p-1f));
    p = V::fma(p, f, V::set(1.0f));
    return p.times_two_to(x);  // its floor
  }
};

M3AE_INLINE __m256i rounded_bf16(VecF32 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)); }
M3AE_INLINE VecF32 rest_of_bf16(VecF32 x) { return x - VecF32{VecF32::widened(rounded_bf16(x))}; }
M3AE_INLINE void store_unit_elements(VecF32 x, Pair* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded_bf16(x));
}
// Results, n lanes of them; unlike Vec's own store, subnormals become 0.
M3AE_INLINE void store_rounded(VecF32 x, bfloat16* p, int n) {
  _mm256_mask_storeu_epi16(p, VecF32::first(n), rounded_bf16(x));
}
// Two rows of sums as one row of pairs: contracted along the rows.
M3AE_INLINE void store_pairs(VecF32 even, VecF32 odd, Pair* p) {
  const __m512i low = _mm512_cvtepu16_epi32(rounded_bf16(even));
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded_bf16(odd)), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(low, high));
}

// Rows 2 s and 2 s + 1 interleaved: step s of `b`, contracted along the rows.
M3AE_INLINE void pack_pairs(const bfloat16* rows, int64_t stride, int64_t count, int64_t width, Pair* out, int64_t ld) {
  for (int64_t r = 0; r < count; r += 2) {
    const bfloat16 *even = rows + r * stride, *odd = even + stride;
    Pair* to = out + r / 2 * ld;
    for (int64_t d = 0; d < ld; d += 16) {
      const __mmask16 lanes = VecF32::first(static_cast<int>(d >= width ? 0 : width - d < 16 ? width - d : 16));
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even + d));
      const __mmask16 partner = r + 1 < count ? lanes : 0;
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(partner, odd + d));
      _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

}  // namespace m3ae::M3AE_ISA
