// Products of small matrices that stay in cache: pack both sides once, multiply with register-blocked tiles.
//
//     c[m][n] (+)= sum_k a[m][k] b[k][n]
//
// The contraction runs in units: one element, or on avx512_bf16 two bf16 neighbors along k, which VDPBF16PS
// multiplies and adds in one instruction. `a` is read one unit at a time and broadcast, from anywhere (a stride for
// each direction); `b` is read a vector of units at a time, so n must be its dense direction. Sums are fp32 (fp64 for
// fp64). Elsewhere bf16 is widened to fp32 when it is packed. On amx pairs are contracted by tiles: gemm_amx.h.
#pragma once

#include <type_traits>

#include "cpu/units.h"
#include M3AE_FILE(gemm, M3AE_ISA)

namespace m3ae::M3AE_ISA {

template <class T>
struct unit_of { using type = typename Vec<T>::scalar; };
template <>
struct unit_of<bfloat16> { using type = Bf16Unit; };

// What elements of type T become when they are packed.
template <class T>
using Unit = typename unit_of<T>::type;

// ---- register tiles: kTileRows x kTileVectors accumulators, one register for a, kTileVectors for b ----

constexpr int kTileRows = 6;

// The sums stay in registers only where the compiler sees every index: each loop over them is unrolled by name.
#define M3AE_EACH(index, count) _Pragma("GCC unroll 8") for (int index = 0; index < count; ++index)

// `tiles` of them, one below the other.
template <class Unit, int rows, int vectors>
void multiply_tiles(const Product<Unit>& p, int64_t tiles) {
  using U = Units<Unit>;
  using V = typename U::V;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    V sum[rows][vectors];
    M3AE_EACH(m, rows) M3AE_EACH(v, vectors) sum[m][v] = V::zero();
    const Unit *a = p.a + tile * rows * p.a_row, *b = p.b;
    for (int64_t k = 0; k < p.steps; ++k, a += p.a_step, b += p.b_step) {
      typename U::Register right[vectors];
      M3AE_EACH(v, vectors) right[v] = U::load(b + v * V::width);
      M3AE_EACH(m, rows) {
        const typename U::Register left = U::set(a + m * p.a_row);
        M3AE_EACH(v, vectors) sum[m][v] = U::dot(left, right[v], sum[m][v]);
      }
    }
    typename V::scalar* c = p.c + tile * rows * p.c_row;
    if (p.accumulate) {
      M3AE_EACH(m, rows) M3AE_EACH(v, vectors) {
        typename V::scalar* to = c + m * p.c_row + v * V::width;
        (V::load(to) + sum[m][v]).store(to);
      }
    } else {
      M3AE_EACH(m, rows) M3AE_EACH(v, vectors) sum[m][v].store(c + m * p.c_row + v * V::width);
    }
  }
}

template <class Unit, int vectors>
M3AE_INLINE void multiply_rows(const Product<Unit>& p, int64_t rows, int64_t tiles) {
  static_assert(kTileRows == 6, "one case for each height");
  switch (rows) {
    case 1: return multiply_tiles<Unit, 1, vectors>(p, tiles);
    case 2: return multiply_tiles<Unit, 2, vectors>(p, tiles);
    case 3: return multiply_tiles<Unit, 3, vectors>(p, tiles);
    case 4: return multiply_tiles<Unit, 4, vectors>(p, tiles);
    case 5: return multiply_tiles<Unit, 5, vectors>(p, tiles);
    case 6: return multiply_tiles<Unit, 6, vectors>(p, tiles);
  }
}

// m rows by n lanes (a multiple of the vector width), in tiles of nearly equal size: no thin last one.
template <class Unit>
void multiply(const Product<Unit>& whole, int64_t m, int64_t n) {
  constexpr int width = Units<Unit>::V::width;
  const int64_t vectors = n / width;
  const int64_t across = (vectors + kTileVectors - 1) / kTileVectors, down = (m + kTileRows - 1) / kTileRows;
  if (down == 0) return;
  const int64_t rows = m / down, higher = m % down;  // so many tiles are one row higher
  for (int64_t i = 0; i < across; ++i) {
    const int64_t first = vectors * i / across, count = vectors * (i + 1) / across - first;
    Product<Unit> p = whole;
    p.b += first * width;
    p.c += first * width;
    for (int64_t part = 0; part < 2; ++part) {
      const int64_t height = part ? rows : rows + 1, tiles = part ? down - higher : higher;
      if (tiles == 0) continue;
      if (kTileVectors > 2 && count == 4) multiply_rows<Unit, kTileVectors>(p, height, tiles);
      else if (kTileVectors > 2 && count == 3) multiply_rows<Unit, kTileVectors - 1>(p, height, tiles);
      else if (count == 2) multiply_rows<Unit, 2>(p, height, tiles);
      else multiply_rows<Unit, 1>(p, height, tiles);
      p.a += height * tiles * p.a_row;
      p.c += height * tiles * p.c_row;
    }
  }
}

// A vector of sums as elements of `a` (contracted along the lanes): stored densely, rounded where units are bf16.
template <class V, class T>
M3AE_INLINE void store_rounded(V x, T* p, int n) { store_lanes(x, p, n); }
M3AE_INLINE void store_unit_elements(VecF32 x, float* p) { x.store(p); }
M3AE_INLINE void store_unit_elements(Lane<double> x, double* p) { x.store(p); }

// What is stored as the first or second of two T whose sum is x: x itself, which a store rounds, or what that leaves.
template <class T, class V>
M3AE_INLINE V part_of(V x, int part) {
  if constexpr (std::is_same_v<T, bfloat16> && Units<Unit<T>>::depth == 2) return part == 0 ? x : rest_of_bf16(x);
  return x;
}

// ---- packing: from rows of elements ([count][width], `stride` apart) to units, holes filled with zeros ----

// A vector of units from a row, of which `elements` are left; zeros behind them. Pairs are moved as 32 bits.
template <class T>
M3AE_INLINE Vec<T> load_units(const T* row, int64_t elements) {
  using V = Vec<T>;
  constexpr int64_t most = V::width * Units<Unit<T>>::depth;
  if constexpr (Units<Unit<T>>::depth == 1) {
    return elements >= most ? V::load(row) : V::load_first(row, static_cast<int>(elements));
  } else {
    if (elements >= most) return V::load(reinterpret_cast<const float*>(row));
    float copy[V::width] = {};
    std::memcpy(copy, row, static_cast<size_t>(elements) * sizeof(T));
    return V::load(copy);
  }
}

// The rows themselves, `ld` units each (whole vectors, width at least): `a`, contracted along a row's elements.
template <class T>
void pack_rows(const T* rows, int64_t stride, int64_t count, int64_t width, Unit<T>* out, int64_t ld) {
  using V = Vec<T>;
  constexpr int depth = Units<Unit<T>>::depth;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t s = 0; s < ld; s += V::width) {
      const V units = s * depth < width ? load_units(rows + r * stride + s * depth, width - s * depth) : V::zero();
      units.store(reinterpret_cast<typename V::scalar*>(out + r * ld + s));
    }
}

// Transposed: `b`, contracted along a row's elements; step s holds unit s of every row. ld: count rounded up to a
// vector at least; only that much is written.
template <class T>
void pack_columns(const T* rows, int64_t stride, int64_t count, int64_t width, Unit<T>* out, int64_t ld) {
  using V = Vec<T>;
  constexpr int depth = Units<Unit<T>>::depth;
  const int64_t steps = (width + depth - 1) / depth;
  for (int64_t r = 0; r < count; r += V::width)
    for (int64_t s = 0; s < steps; s += V::width) {
      V block[V::width];
      for (int64_t i = 0; i < V::width; ++i)
        block[i] = r + i < count ? load_units(rows + (r + i) * stride + s * depth, width - s * depth) : V::zero();
      V::transpose(block);
      const int64_t last = steps - s < V::width ? steps - s : V::width;
      for (int64_t i = 0; i < last; ++i)
        block[i].store(reinterpret_cast<typename V::scalar*>(out + (s + i) * ld + r));
    }
}

// As they stand: `b`, contracted along the rows; step s holds row s, or rows 2 s and 2 s + 1 interleaved.
template <class T>
void pack_steps(const T* rows, int64_t stride, int64_t count, int64_t width, Unit<T>* out, int64_t ld) {
  if constexpr (Units<Unit<T>>::depth == 1) {
    pack_rows(rows, stride, count, width, out, ld);
  } else {
    pack_pairs(rows, stride, count, width, out, ld);
  }
}

// out[r][d] = function(rows[r][d]), rounded to T.
template <class T, class Source, class Function>
void map_rows(const Source* rows, int64_t stride, int64_t count, int64_t width, T* out, int64_t ld,
              const Function& function) {
  using V = Vec<T>;
  for (int64_t r = 0; r < count; ++r)
    for_lanes<V>(width, [&](int64_t d, int n) {
      store_rounded(function(load_lanes<V>(rows + r * stride + d, n)), out + r * ld + d, n);
    });
}

// Down the columns of V::width rows that are V::width apart: lane r of the result combines row r.
template <class V, class Combine>
M3AE_INLINE V across(const typename V::scalar* rows, const Combine& combine) {
  V block[V::width];
  for (int i = 0; i < V::width; ++i) block[i] = V::load(rows + i * V::width);
  V::transpose(block);
  for (int half = V::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) block[i] = combine(block[i], block[i + half]);
  return block[0];
}

// ---- the element types of an op's arguments ----

// body(a T) for the dtype.
template <class Body>
M3AE_INLINE auto with_element(Dtype dtype, const Body& body) {
  if (dtype == Dtype::f64) return body(double{});
  if (dtype == Dtype::bf16) return body(bfloat16{});
  return body(float{});
}

// body(a T, an R, a P): what is multiplied, and the types of rows and of parameters.
template <class Arguments, class Body>
M3AE_INLINE auto with_elements(const Arguments& args, const Body& body) {
  if constexpr (Units<Unit<bfloat16>>::depth == 2)
    if (args.parts > 0) return body(bfloat16{}, float{}, float{});
  if (args.dtype == Dtype::bf16 && args.parameter_dtype == Dtype::f32) return body(bfloat16{}, bfloat16{}, float{});
  return with_element(args.dtype, [&](auto element) { return body(element, element, element); });
}

}  // namespace m3ae::M3AE_ISA
