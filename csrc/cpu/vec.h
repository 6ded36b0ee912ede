// Vec: a register of fp32 lanes, implemented per instruction set. Kernels are written on it once.
//   loads and stores convert from and to float, bfloat16 (round to nearest even) and uint8 (load only);
//   *_first(n) touch only the first n lanes; max returns its second operand where one is NaN.
// Vec<double> (one lane) lets fp64 run through the same kernels.
// Everything here sits inside m3ae::M3AE_ISA: a function shared between instruction sets could be linked from the
// wrong one.
#pragma once

#include "cpu/lane.h"
#include M3AE_FILE(vec, M3AE_VECTORS)

namespace m3ae::M3AE_ISA {

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
