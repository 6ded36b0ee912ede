// Products of 16-bit matrices on tensor cores, from sm_80 on: 16 x 8 sums += 16 x 16 left * 16 x 8 right, in fp32.
//
// What a lane holds (PTX ISA, mma.m16n8k16), g = lane / 4, t = lane % 4, two neighbors of a row to a register:
//   left   [0] row g, columns 2t, 2t + 1   [1] row g + 8   [2] row g, columns 2t + 8, 2t + 9   [3] row g + 8
//   right  [0] rows 2t, 2t + 1, column g                   [1] rows 2t + 8, 2t + 9
//   sums   [0] [1] row g, columns 2t, 2t + 1               [2] [3] row g + 8
// So the sums of two products side by side, rounded, are the left factor of the next.
#pragma once

#include <type_traits>

#include "cuda/numbers.cuh"

namespace m3ae::cuda {

#ifdef M3AE_EMULATED

// 2 ^ x.
inline float exp2_fast(float x) { return std::exp2(x); }

template <class T>
uint32_t two(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

// Four 8 x 8 matrices; lane 8 i + r points at row r of matrix i. A lane gets of each its row g, columns 2t, 2t + 1.
template <class T>
void load_matrices(uint32_t (&to)[4], const T* row) {
  const auto shown = emulator::show(load<8>(row), "ldmatrix");
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto values = shown.template read<Pack<T, 8>>(8 * i + g);
    to[i] = values.at[2 * t].bits | static_cast<uint32_t>(values.at[2 * t + 1].bits) << 16;
  }
}

// The same, each matrix transposed: rows 2t, 2t + 1 of column g.
template <class T>
void load_matrices_transposed(uint32_t (&to)[4], const T* row) {
  const auto shown = emulator::show(load<8>(row), "ldmatrix.trans");
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto low = shown.template read<Pack<T, 8>>(8 * i + 2 * t);
    const auto high = shown.template read<Pack<T, 8>>(8 * i + 2 * t + 1);
    to[i] = low.at[g].bits | static_cast<uint32_t>(high.at[g].bits) << 16;
  }
}

template <class T>
void mma(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  struct Factors {
    T left[4][2], right[2][2];
  };
  const uint32_t registers[6] = {left[0], left[1], left[2], left[3], right0, right1};
  Factors mine;
  static_assert(sizeof(mine) == sizeof(registers));
  std::memcpy(&mine, registers, sizeof(mine));
  const auto shown = emulator::show(mine, "mma");
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int quarter = 0; quarter < 4; ++quarter) {
    const auto row = shown.template read<Factors>(4 * g + quarter);
    const Factors columns[2] = {shown.template read<Factors>(8 * t + quarter),
                                shown.template read<Factors>(8 * t + 4 + quarter)};
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 4; ++k)
        sums[i] += widen(row.left[k / 2 * 2 + i / 2][k % 2]) * widen(columns[i % 2].right[k / 2][k % 2]);
  }
}

// Sixteen bytes from global to shared memory, zeros where not `real`, on their way until this thread waits for them.
inline void copy16(void* to, const void* from, bool real) {
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16)
    throw std::logic_error("an asynchronous copy is not aligned");
  emulator::current->copies.push_back({to, real ? *static_cast<const uint4*>(from) : uint4{},
                                       emulator::current->groups});
}
// Ends a group of copies.
inline void copies_end() { ++emulator::current->groups; }
// Waits for all copies, or for those of all groups but the last one ended.
inline void copies_wait() { emulator::copies_wait(-1); }
inline void copies_wait_but_last() { emulator::copies_wait(1); }

#else

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
__device__ __forceinline__ uint32_t two(float low, float high);
template <>
__device__ __forceinline__ uint32_t two<bfloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
__device__ __forceinline__ uint32_t two<float16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

#define M3AE_MMA(type)                                                                                             \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
      "{%0, %1, %2, %3};"                                                                                          \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                 \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1))
template <class T>
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same<T, bfloat16>::value) M3AE_MMA("bf16");
  else M3AE_MMA("f16");
}
#undef M3AE_MMA

__device__ __forceinline__ void copy16(void* to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void copies_wait_but_last() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

#endif

}  // namespace m3ae::cuda
