// Products of amx: TDPBF16PS contracts sixteen pairs at a time, on tiles of 16 x 16 sums. A block is two by two of them,
// so that each tile of `a` and `b` that is loaded serves twice. Everything else is avx512_bf16's.
#pragma once

#include "cpu/gemm_avx512_bf16.h"
#include "cpu/tiles.h"

namespace m3ae::M3AE_ISA {

template <>
inline constexpr bool kDenseLeft<Pair> = true;

constexpr int64_t kTile = 16;  // rows of a tile; its columns of sums; pairs that it contracts

template <>
inline constexpr int64_t kTileHeight<Pair> = kTile;
template <>
inline constexpr int64_t kWholeRows<Pair> = 2 * kTile;

// Configurations of a block by its rows, 1 to 32. Tiles 0 1 / 2 3 are sums, 4 and 5 rows of `a`, 6 and 7 columns of `b`.
struct TileConfigs {
  TileConfig of[kWholeRows<Pair> + 1];
  constexpr TileConfigs() : of() {
    for (int rows = 1; rows <= kWholeRows<Pair>; ++rows) {
      const int above = rows < kTile ? rows : kTile, below = rows - above;
      const int height[8] = {above, above, below, below, above, below, kTile, kTile};
      for (int tile = 0; tile < 8; ++tile) {
        of[rows].rows[tile] = static_cast<uint8_t>(height[tile]);
        of[rows].row_bytes[tile] = height[tile] ? 64 : 0;
      }
    }
  }
};
inline constexpr TileConfigs kTileConfigs;

// Tiles are configured for whole blocks. oneDNN, on the same threads, has its own configuration.
template <>
struct Multiplying<Pair> {
  Multiplying() { TILE_CONFIGURE(kTileConfigs.of[kWholeRows<Pair>]); }
  ~Multiplying() { TILE_RELEASE(); }
  Multiplying(const Multiplying&) = delete;
  Multiplying& operator=(const Multiplying&) = delete;
};

// Where the tiles of a step are loaded from; strides in bytes.
struct TileStep {
  const Pair *above, *below;  // rows of `a`
  int64_t a_stride;
  const Pair* right;          // columns of `b`
  int64_t b_stride;
};

// All loads before the first product: measured 1.45x the speed of loads and products in turn.
template <bool two_rows, bool two_columns>
M3AE_INLINE void add_products(const TileStep& s) {
  TILE_LOAD(4, s.above, s.a_stride);
  if (two_rows) TILE_LOAD(5, s.below, s.a_stride);
  TILE_LOAD(6, s.right, s.b_stride);
  if (two_columns) TILE_LOAD(7, s.right + kTile, s.b_stride);
  TILE_DOT(0, 4, 6);
  if (two_columns) TILE_DOT(1, 4, 7);
  if (two_rows) TILE_DOT(2, 5, 6);
  if (two_rows && two_columns) TILE_DOT(3, 5, 7);
}

// One block: `tiles` steps of sixteen pairs where they lie, then the rest of the pairs, padded with zeros.
template <bool two_rows, bool two_columns>
void multiply_block(TileStep s, int64_t tiles, int64_t b_step, const TileStep* rest, float* c, int64_t c_row,
                    bool accumulate) {
  const int64_t c_stride = c_row * 4;
  float* const below = c + kTile * c_row;
  if (accumulate) {
    TILE_LOAD(0, c, c_stride);
    if (two_columns) TILE_LOAD(1, c + kTile, c_stride);
    if (two_rows) TILE_LOAD(2, below, c_stride);
    if (two_rows && two_columns) TILE_LOAD(3, below + kTile, c_stride);
  } else {
    TILE_ZERO(0);
    if (two_columns) TILE_ZERO(1);
    if (two_rows) TILE_ZERO(2);
    if (two_rows && two_columns) TILE_ZERO(3);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    add_products<two_rows, two_columns>(s);
    s.above += kTile, s.below += kTile, s.right += kTile * b_step;
  }
  if (rest) add_products<two_rows, two_columns>(*rest);
  TILE_STORE(0, c, c_stride);
  if (two_columns) TILE_STORE(1, c + kTile, c_stride);
  if (two_rows) TILE_STORE(2, below, c_stride);
  if (two_rows && two_columns) TILE_STORE(3, below + kTile, c_stride);
}

// Copies [rows][width] pairs, `stride` apart, into [to_rows][to_width] and fills the rest with zeros. `to` starts on a
// cache line, and to_width is a multiple of 16.
M3AE_INLINE void copy_padded(const Pair* from, int64_t stride, int64_t rows, int64_t width, Pair* to, int64_t to_rows,
                             int64_t to_width) {
  for (int64_t r = 0; r < to_rows; ++r)
    for (int64_t d = 0; d < to_width; d += 16) {
      const int64_t left = r < rows && d < width ? width - d : 0;
      const __mmask16 lanes = VecF32::first(static_cast<int>(left < 16 ? left : 16));
      _mm512_store_si512(to + r * to_width + d, _mm512_maskz_loadu_epi32(lanes, from + r * stride + d));
    }
}

// `a` whose rows lie along k (a_row 1): sixteen units of sixteen rows at a time, transposed.
M3AE_INLINE void transpose_rows(const Pair* from, int64_t step, int64_t rows, int64_t steps, Pair* to, int64_t ld) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t k = 0; k < steps; k += 16) {
      const __mmask16 lanes = VecF32::first(static_cast<int>(rows - r < 16 ? rows - r : 16));
      VecF32 block[16];
      for (int64_t i = 0; i < 16; ++i)
        block[i] = k + i < steps ? VecF32{_mm512_maskz_loadu_ps(lanes, from + (k + i) * step + r)} : VecF32::zero();
      VecF32::transpose(block);
      for (int64_t i = 0; i < 16; ++i) block[i].store(reinterpret_cast<float*>(to + (r + i) * ld + k));
    }
}

// Blocks of so many rows each, one below the other, for which the tiles are configured.
inline void multiply_blocks(const Product<Pair>& p, int64_t blocks, int64_t rows, int64_t n) {
  constexpr int64_t kColumns = 2 * kTile;
  const int64_t tiles = p.steps / kTile, rest = p.steps % kTile;
  alignas(64) Pair a_rest[kWholeRows<Pair> * kTile], b_rest[kTile * kColumns];
  const TileStep last{a_rest, a_rest + kTile * kTile, kTile * 4, b_rest, kColumns * 4};
  for (int64_t column = 0; column < n; column += kColumns) {
    const bool two_columns = n - column > kTile;
    const Pair* right = p.b + column;
    if (rest)
      copy_padded(right + tiles * kTile * p.b_step, p.b_step, rest, two_columns ? kColumns : kTile, b_rest, kTile,
                  kColumns);
    for (int64_t row = 0; row < blocks * rows; row += rows) {
      const Pair* left = p.a + row * p.a_row;
      const TileStep step{left, left + kTile * p.a_row, p.a_row * 4, right, p.b_step * 4};
      if (rest && (column == 0 || blocks > 1))
        copy_padded(left + tiles * kTile, p.a_row, rows, rest, a_rest, rows, kTile);
      float* c = p.c + row * p.c_row + column;
      const auto run = [&](auto block) {
        block(step, tiles, p.b_step, rest ? &last : nullptr, c, p.c_row, p.accumulate);
      };
      if (rows > kTile) two_columns ? run(multiply_block<true, true>) : run(multiply_block<true, false>);
      else two_columns ? run(multiply_block<false, true>) : run(multiply_block<false, false>);
    }
  }
}

template <>
inline void multiply<Pair>(const Product<Pair>& p, int64_t m, int64_t n) {
  constexpr int64_t kRows = kWholeRows<Pair>, kMost = 256;  // steps that are transposed at a time
  if (p.a_step != 1) {
    alignas(64) Pair dense[kRows * (kMost + kTile)];
    for (int64_t row = 0; row < m; row += kRows) {
      const int64_t rows = m - row < kRows ? m - row : kRows;
      int64_t k = 0;
      do {
        const int64_t steps = p.steps - k < kMost ? p.steps - k : kMost;
        transpose_rows(p.a + row * p.a_row + k * p.a_step, p.a_step, rows, steps, dense, kMost + kTile);
        multiply<Pair>({dense, kMost + kTile, 1, p.b + k * p.b_step, p.b_step, p.c + row * p.c_row, p.c_row, steps,
                        p.accumulate || k > 0}, rows, n);
        k += kMost;
      } while (k < p.steps);
    }
    return;
  }
  const int64_t whole = m / kRows, rows = m % kRows;
  if (whole > 0) multiply_blocks(p, whole, kRows, n);
  if (rows == 0) return;
  Product<Pair> below = p;
  below.a += whole * kRows * p.a_row;
  below.c += whole * kRows * p.c_row;
  const bool thin = rows % kTile != 0;
  if (thin) TILE_CONFIGURE(kTileConfigs.of[rows]);
  multiply_blocks(below, 1, rows, n);
  if (thin) TILE_CONFIGURE(kTileConfigs.of[kRows]);
}

}  // namespace m3ae::M3AE_ISA
