// A sum of products that passes the lowest number on its way stays at minus infinity, whatever follows.
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace m3ae::M3AE_ISA {

// from + the sum of x(d) * y(d) over [0, width), in fp64 and of terms so small that it is infinite only as a whole.
template <class X, class Y>
double whole_sum(double from, int64_t width, const X& x, const Y& y) {
  constexpr double small = 0x1p-520;
  double sum = from * small * small;
  for (int64_t d = 0; d < width; ++d) sum += x(d) * small * (y(d) * small);
  return sum / small / small;
}

// One value as fp64.
template <class T>
M3AE_INLINE double value_at(const T* p) { return static_cast<double>(Vec<T>::load_first(p, 1).sum()); }

}  // namespace m3ae::M3AE_ISA
