// What products of matrices are made of: units of contraction, and the operands of a product (csrc/cpu/gemm.h).
#pragma once

#include "cpu/vec.h"

namespace m3ae::M3AE_ISA {

template <class Unit>
struct Units {  // float and double
  static constexpr int depth = 1;
  using V = Vec<Unit>;
  using Register = V;
  static M3AE_INLINE Register set(const Unit* p) { return V::set(*p); }
  static M3AE_INLINE Register load(const Unit* p) { return V::load(p); }
  static M3AE_INLINE V dot(Register a, Register b, V c) { return V::fma(a, b, c); }
  static M3AE_INLINE V exp2(V x) { return m3ae::M3AE_ISA::exp2(x); }  // 2^x, as exact as a unit can hold
};

M3AE_INLINE constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class Unit>
struct Product {
  const Unit* a;
  int64_t a_row, a_step;  // strides in units: along m, along k
  const Unit* b;
  int64_t b_step;         // along k; n is dense
  typename Units<Unit>::V::scalar* c;
  int64_t c_row;
  int64_t steps;          // units along k
  bool accumulate;        // c += instead of c =
};

// Whether `a` is read by tiles, dense along k (a_step 1): rows that lie along k are then transposed, best once for all
// products that share them.
template <class Unit>
inline constexpr bool kDenseLeft = false;

// Rows that a product computes together: blocks of rows are whole numbers of them, but for the last. And rows of a
// tile: this one is best whole, too, where `a` and `c` have memory behind their last row.
template <class Unit>
inline constexpr int64_t kWholeRows = 1;
template <class Unit>
inline constexpr int64_t kTileHeight = 1;

// Where share i of `count` rows begins; share `shares` would begin behind them.
template <class Unit>
int64_t share_begin(int64_t count, int64_t i, int64_t shares) {
  const int64_t begin = (count + kWholeRows<Unit> - 1) / kWholeRows<Unit> * i / shares * kWholeRows<Unit>;
  return begin < count ? begin : count;
}

// Exists while a task multiplies: amx configures its tiles once for all of a task's products.
template <class Unit>
struct Multiplying {
  Multiplying() {}  // not a trivial one: a variable of this type is never unused
};

// m rows by n lanes, a multiple of the vector width; while a Multiplying<Unit> exists.
template <class Unit>
void multiply(const Product<Unit>& whole, int64_t m, int64_t n);

}  // namespace m3ae::M3AE_ISA
