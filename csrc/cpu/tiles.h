// The tile instructions of AMX by name: TILE_LOAD(4, p, stride_bytes), ... on tiles 0 to 7. Compiled without AMX they are
// the same operations in plain C++, so that its kernels are tested on machines that lack it.
//
// They are written as assembly because GCC's intrinsics do not tell the compiler that a tile load reads memory: it may
// move a store to the same memory behind it.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lane.h"

namespace m3ae::M3AE_ISA {

// The operand of LDTILECFG. A tile is up to 16 rows of up to 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "what LDTILECFG reads");

#ifdef __AMX_BF16__

#define TILE_CONFIGURE(config) __asm__ volatile("ldtilecfg %0" ::"m"(config))
#define TILE_RELEASE() __asm__ volatile("tilerelease")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_LOAD(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
// tile c += tile a, rows of bf16 pairs, times tile b, pairs of rows interleaved
#define TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

#else

struct EmulatedTiles {
  TileConfig config;
  alignas(64) char tile[8][16][64] = {};
  bool configured = false;

  static EmulatedTiles& of_this_thread() {
    static thread_local EmulatedTiles tiles;
    return tiles;
  }
  void configure(const TileConfig& c) { *this = EmulatedTiles(), config = c, configured = true; }
  void zero(int t) {
    check(t);
    std::memset(tile[t], 0, sizeof(tile[t]));
  }
  void load(int t, const void* from, int64_t stride) {
    zero(t);
    for (int r = 0; r < config.rows[t]; ++r)
      std::memcpy(tile[t][r], static_cast<const char*>(from) + r * stride, config.row_bytes[t]);
  }
  void store(int t, void* to, int64_t stride) {
    check(t);
    for (int r = 0; r < config.rows[t]; ++r)
      std::memcpy(static_cast<char*>(to) + r * stride, tile[t][r], config.row_bytes[t]);
  }
  void dot(int c, int a, int b) {
    check(a), check(b), check(c);
    const int pairs = config.row_bytes[a] / 4;
    if (config.rows[a] != config.rows[c] || config.rows[b] != pairs || config.row_bytes[b] != config.row_bytes[c])
      __builtin_trap();  // the instruction raises #UD
    for (int m = 0; m < config.rows[c]; ++m)
      for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
        float part[2] = {};  // as the instruction adds: even elements and odd ones, then both to the sum
        for (int k = 0; k < pairs; ++k)
          for (int half = 0; half < 2; ++half) part[half] += value(a, m, 2 * k + half) * value(b, k, 2 * n + half);
        const float sum = element<float>(c, m, n) + (part[0] + part[1]);
        std::memcpy(tile[c][m] + 4 * n, &sum, 4);
      }
  }

 private:
  void check(int t) const {
    if (!configured || config.rows[t] == 0) __builtin_trap();
  }
  template <class T>
  T element(int t, int row, int i) const {
    T x;
    std::memcpy(&x, tile[t][row] + i * sizeof(T), sizeof(T));
    return x;
  }
  float value(int t, int row, int i) const { return widen(element<bfloat16>(t, row, i)); }
};

#define TILE_CONFIGURE(config) EmulatedTiles::of_this_thread().configure(config)
#define TILE_RELEASE() EmulatedTiles::of_this_thread() = EmulatedTiles()
#define TILE_ZERO(tile) EmulatedTiles::of_this_thread().zero(tile)
#define TILE_LOAD(tile, from, stride) EmulatedTiles::of_this_thread().load(tile, from, stride)
#define TILE_STORE(tile, to, stride) EmulatedTiles::of_this_thread().store(tile, to, stride)
#define TILE_DOT(c, a, b) EmulatedTiles::of_this_thread().dot(c, a, b)

#endif

}  // namespace m3ae::M3AE_ISA
