// CUDA's execution model on one CPU thread, so that the kernels of csrc/ops/*/*_cuda.cu can be tested on any machine:
// what TRITON_INTERPRET=1 is to Triton. Slow; never part of an installed package (CMake: -DM3AE_EMULATE=ON).
//
// A block's threads are fibers. Each runs until it has to wait for others, at a barrier or at an operation of its warp;
// a barrier falls when every thread of the block that has not returned waits there. So between two barriers the warps
// run one after the other, and so do a warp's threads between two of its operations: ascending, or descending after
// reverse(), and a kernel whose results differ between the two lacks a barrier. What a GPU leaves undefined is an error
// here: lanes of a warp at different operations, lanes that have returned, a barrier that not all threads reach.
// Dynamic shared memory starts as NaN, and what is written just past it is found; misaligned vectors throw;
// asynchronous copies arrive when their thread waits for them and no earlier.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // of a block, and blocks run one after the other
#define threadIdx (::m3ae::emulator::current->index)
#define blockIdx (::m3ae::emulator::block_index)
#define blockDim (::m3ae::emulator::block_size)
#define gridDim (::m3ae::emulator::grid_size)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace m3ae::emulator {

constexpr int kWarp = 32;
constexpr size_t kFence = 64;  // uint4s behind a block's dynamic shared memory that nobody may write
constexpr size_t kStack = 256 << 10, kSlot = 64;  // bytes: of a fiber's stack, of what a lane shows its warp at a time

enum class State { runs, at_barrier, at_warp, done };

struct Copy {
  void* to;
  uint4 value;
  int group;
};

struct Fiber {
  ucontext_t context;
  dim3 index;
  int number = 0;
  State state = State::done;
  const char* operation = nullptr;  // that it waits at
  int arrived = 0, vote = 0;        // at the block's barrier: how often, and with what
  int turn = 0;                     // operations of its warp so far
  alignas(16) unsigned char slots[2][kSlot];
  std::vector<Copy> copies;         // begun, not waited for
  int groups = 0;                   // of copies, ended
  std::unique_ptr<unsigned char[]> stack;
};

inline dim3 block_index, block_size, grid_size;
inline Fiber* current = nullptr;
inline std::vector<std::unique_ptr<Fiber>> fibers;  // of the block, by number
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline std::exception_ptr failure;
inline int votes[2];  // sums of the last two barriers
inline std::vector<uint4> shared;
inline bool reversed = false;

// Threads and blocks run in descending order from now on, or ascending again.
inline void reverse(bool on) { reversed = on; }

inline void wait(State state, const char* operation) {
  current->state = state;
  current->operation = operation;
  swapcontext(&current->context, &scheduler);
}

inline void enter() {
  try {
    kernel();
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
  current->state = State::done;
  swapcontext(&current->context, &scheduler);
}

inline void start(Fiber& fiber, int number) {
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
  fiber.number = number;
  const unsigned n = static_cast<unsigned>(number);
  fiber.index = {n % block_size.x, n / block_size.x % block_size.y, n / block_size.x / block_size.y};
  fiber.state = State::runs;
  fiber.arrived = fiber.turn = fiber.groups = 0;
  fiber.copies.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, enter, 0);
}

// Lets a warp go on whose lanes all wait at the same operation. False: they do not.
inline bool release_warp(int first, int threads) {
  const int last = std::min(first + kWarp, threads);
  int waiting = 0, done = 0;
  for (int i = first; i < last; ++i) {
    waiting += fibers[i]->state == State::at_warp;
    done += fibers[i]->state == State::done;
  }
  if (waiting == 0) return false;
  if (done != 0) throw std::logic_error(std::string("a warp's operation after lanes have returned"));
  if (waiting != last - first) return false;
  for (int i = first; i < last; ++i)
    if (std::strcmp(fibers[i]->operation, fibers[first]->operation) != 0)
      throw std::logic_error(std::string("lanes of a warp at different operations: ") + fibers[i]->operation + ", " +
                             fibers[first]->operation);
  for (int i = first; i < last; ++i) fibers[i]->state = State::runs;
  return true;
}

// Lets the block go on if all its threads that have not returned wait at the barrier. False: none is left.
inline bool release_block(int threads) {
  int waiting = 0, done = 0, sum = 0, turn = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    done += fiber.state == State::done;
    if (fiber.state != State::at_barrier) continue;
    if (waiting++ == 0) turn = fiber.arrived;
    if (fiber.arrived != turn) throw std::logic_error("threads of a block at different barriers");
    sum += fiber.vote;
  }
  if (done == threads) return false;
  if (waiting + done != threads) throw std::logic_error("some threads wait for the block, others for their warp");
  votes[turn % 2] = sum;
  for (int i = 0; i < threads; ++i)
    if (fibers[i]->state == State::at_barrier) fibers[i]->state = State::runs;
  return true;
}

inline void run_block(int threads) {
  std::memset(static_cast<void*>(shared.data()), 0xFF, shared.size() * sizeof(uint4));  // NaN
  for (int i = 0; i < threads; ++i) start(*fibers[i], i);
  const int warps = (threads + kWarp - 1) / kWarp;
  do {
    for (int w = 0; w < warps; ++w) {
      const int first = (reversed ? warps - 1 - w : w) * kWarp, last = std::min(first + kWarp, threads);
      do {
        for (int i = first; i < last; ++i) {
          current = fibers[reversed ? first + last - 1 - i : i].get();
          if (current->state == State::runs) swapcontext(&scheduler, &current->context);
          if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
        }
      } while (release_warp(first, threads));
    }
  } while (release_block(threads));
  const auto* fence = reinterpret_cast<const unsigned char*>(shared.data() + shared.size() - kFence);
  if (std::any_of(fence, fence + kFence * sizeof(uint4), [](unsigned char byte) { return byte != 0xFF; }))
    throw std::logic_error("a block has written past its dynamic shared memory");
}

// Every block of a launch.
inline void run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  grid_size = grid;
  block_size = block;
  kernel = std::move(body);
  shared.assign((shared_bytes + 15) / 16 + kFence, uint4{});
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t b = reversed ? blocks - 1 - i : i;
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(threads);
  }
}

// This thread's copies of groups before the last `but` arrive.
inline void copies_wait(int but) {
  std::vector<Copy> late;
  for (const Copy& copy : current->copies) {
    if (copy.group < current->groups - but) *static_cast<uint4*>(copy.to) = copy.value;
    else late.push_back(copy);
  }
  current->copies = std::move(late);
}

// What each lane shows the others of its warp: read(lane) gives it, until the warp's operation after next.
struct Shown {
  int first, slot;
  template <class T>
  T read(int lane) const {
    T value;
    std::memcpy(&value, fibers[first + lane]->slots[slot], sizeof(T));
    return value;
  }
};

template <class T>
Shown show(const T& value, const char* operation) {
  static_assert(sizeof(T) <= kSlot);
  const int slot = current->turn++ % 2;
  std::memcpy(current->slots[slot], &value, sizeof(T));
  wait(State::at_warp, operation);
  return {current->number / kWarp * kWarp, slot};
}

inline int lane() { return current->number % kWarp; }

inline int barrier(int vote, const char* operation) {
  const int turn = ++current->arrived;
  current->vote = vote;
  wait(State::at_barrier, operation);
  return votes[turn % 2];
}

inline void whole_warp(unsigned mask) {
  if (mask != 0xFFFFFFFFu) throw std::logic_error("the emulator knows operations of whole warps only");
}

}  // namespace m3ae::emulator

inline void __syncthreads() { m3ae::emulator::barrier(0, "__syncthreads"); }
inline int __syncthreads_count(int vote) { return m3ae::emulator::barrier(vote != 0, "__syncthreads_count"); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  m3ae::emulator::whole_warp(mask);
  m3ae::emulator::show(0, "__syncwarp");
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  m3ae::emulator::whole_warp(mask);
  return m3ae::emulator::show(value, "__shfl_sync").template read<T>(from % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  m3ae::emulator::whole_warp(mask);
  const auto shown = m3ae::emulator::show(value, "__shfl_xor_sync");
  return shown.template read<T>(m3ae::emulator::lane() ^ with);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  m3ae::emulator::whole_warp(mask);
  const auto shown = m3ae::emulator::show(value, "__shfl_up_sync");
  const int lane = m3ae::emulator::lane();
  return lane < by ? value : shown.template read<T>(lane - by);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  m3ae::emulator::whole_warp(mask);
  const auto shown = m3ae::emulator::show(vote != 0, "__ballot_sync");
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(shown.read<bool>(i)) << i;
  return votes;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  m3ae::emulator::whole_warp(mask);
  const auto shown = m3ae::emulator::show(value, "__match_any_sync");
  unsigned peers = 0;
  for (int i = 0; i < 32; ++i) peers |= static_cast<unsigned>(shown.template read<T>(i) == value) << i;
  return peers;
}
// Blocks run one after the other: the counter is its caller's alone, and all that others wrote is seen.
inline unsigned atomicInc(unsigned* counter, unsigned limit) {
  const unsigned before = *counter;
  *counter = before >= limit ? 0 : before + 1;
  return before;
}
inline void __threadfence() {}
template <class T>
T __ldcg(const T* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % alignof(T)) throw std::logic_error("a load is not aligned");
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float __fmul_rn(float a, float b) { return a * b; }  // built with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
