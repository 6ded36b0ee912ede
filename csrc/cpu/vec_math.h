// Functions of vectors, for fp32 to a few roundings, for fp64 (one lane) by the C library.
#pragma once

#include <cmath>

#include "cpu/vec.h"

namespace m3ae::M3AE_ISA {

// e^x for x up to 88.7; relative error 2e-7 at any x, 0 below -110, NaN stays NaN.
template <class V>
M3AE_INLINE V exp(V x) {
  if constexpr (V::width == 1) {
    return {std::exp(x.v)};
  } else {
    x = V::max(V::set(-110.0f), x);  // in this order: max returns its second operand where one is NaN
    const V exponent = x * V::set(0x1.715476p+0f);  // log2 e, and what this product rounded away:
    const V rest = V::fma(x, V::set(0x1.4ae0c0p-26f), V::fma(x, V::set(0x1.715476p+0f), V::zero() - exponent));
    const V y = exp2(exponent);
    return V::fma(y, rest * V::set(0x1.62e430p-1f), y);
  }
}

// The normal distribution at x: `below` the mass below -|x|, `density` at x.
template <class V>
struct Normal {
  V below, density;

  static M3AE_INLINE Normal at(V x) {
    const V a = magnitude(x), bell = exp(x * x * V::set(-0.5f));
    if constexpr (sizeof(typename V::scalar) == 8) {
      return {{std::erfc(a.v * M_SQRT1_2) * 0.5}, bell * V::set(0.39894228040143267794)};
    } else {
      // below = bell * q(1 / (1 + 0.3 a)), q by least maximum relative error (5.8e-8) over a in [0, 14]
      const V t = V::set(1.0f) / V::fma(V::set(0.3f), a, V::set(1.0f));
      V q = V::set(0x1.3a6622p-5f);
      q = V::fma(q, t, V::set(-0x1.5a74f0p-3f));
      q = V::fma(q, t, V::set(0x1.d44e04p-3f));
      q = V::fma(q, t, V::set(-0x1.3963b4p-4f));
      q = V::fma(q, t, V::set(0x1.23eb34p-3f));
      q = V::fma(q, t, V::set(0x1.83d1aep-4f));
      q = V::fma(q, t, V::set(0x1.f36304p-4f));
      q = V::fma(q, t, V::set(0x1.e96be4p-4f));
      q = V::fma(q, t, V::set(0x1.e1344ep-18f));
      return {bell * q, bell * V::set(0x1.988454p-2f)};
    }
  }
};

}  // namespace m3ae::M3AE_ISA
