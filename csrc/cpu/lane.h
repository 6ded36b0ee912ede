// What the vectors of all instruction sets share: conversions, and a vector of one lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtype.h"

// M3AE_FILE(gemm, M3AE_ISA): "cpu/gemm_<isa>.h", of the instruction set that is being compiled
#define M3AE_QUOTE(path) #path
#define M3AE_FILE_NAMED(kind, isa) M3AE_QUOTE(cpu/kind##_##isa.h)
#define M3AE_FILE(kind, isa) M3AE_FILE_NAMED(kind, isa)

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

// One lane: fp64 everywhere, and fp32 on the scalar instruction set, where the compiler vectorizes the loop itself.
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

template <class Float>
M3AE_INLINE Lane<Float> operator/(Lane<Float> a, Lane<Float> b) { return {a.v / b.v}; }
template <class Float>
M3AE_INLINE Lane<Float> magnitude(Lane<Float> x) { return {std::abs(x.v)}; }
template <class Float>
M3AE_INLINE Lane<Float> where_negative(Lane<Float> x, Lane<Float> yes, Lane<Float> no) { return x.v < 0 ? yes : no; }

// interleave3: three planes to pixels, out = a0 b0 c0 a1 b1 c1 ... over three vectors. Lane i of vector k holds lane
// (width * k + i) / 3 of a plane; which plane says the mask of a blend.
template <int width>
struct PixelOfLane {
  int32_t of[3][width] = {};
  constexpr PixelOfLane() {
    for (int i = 0; i < 3 * width; ++i) of[i / width][i % width] = i / 3;
  }
};

}  // namespace m3ae::M3AE_ISA
