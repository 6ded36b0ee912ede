// Working memory of a kernel.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

namespace m3ae {

// `bytes` of memory that start on a cache line: vector loads and stores across two lines cost twice.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(new char[static_cast<size_t>(bytes) + kLine]) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    start_ = memory_.get() + (kLine - address % kLine) % kLine;
  }
  char* get() const { return start_; }

 private:
  static constexpr std::uintptr_t kLine = 64;
  std::unique_ptr<char[]> memory_;
  char* start_;
};

}  // namespace m3ae
