// Working memory of a kernel.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "cpu/threads.h"

namespace m3ae {

// `bytes` of memory that start on a cache line: vector loads and stores across two lines cost twice. The calling thread
// keeps what is given back for its next Scratch, until it ends or takes a larger one: fresh pages cost a good part of
// the work on them. It keeps one, of 32 MiB and 2 MiB for each thread of OpenMP at most.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes <= most_kept()) block_ = std::exchange(kept(), Block{});
    if (block_.bytes >= bytes) return;
    block_ = Block{};  // before the larger one: at no time are there both
    block_.memory.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kLine)));
    block_.bytes = bytes;
  }
  ~Scratch() {
    if (block_.bytes > kept().bytes && block_.bytes <= most_kept()) kept() = std::move(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* get() const { return block_.memory.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, kLine); }
  };
  struct Block {
    std::unique_ptr<char, Free> memory;
    int64_t bytes = 0;
  };
  static Block& kept() {
    static thread_local Block block;
    return block;
  }
#ifdef __SANITIZE_ADDRESS__  // it sees the end of fresh memory, not the end of what is used of a larger piece
  static int64_t most_kept() { return -1; }
#else
  static int64_t most_kept() { return (int64_t{32} << 20) + (int64_t{2} << 20) * max_threads(); }
#endif

  Block block_;
};

}  // namespace m3ae
