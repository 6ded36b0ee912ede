// Threads: OpenMP's, which are torch's own when torch was imported first (torch.set_num_threads rules them).
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace m3ae {

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// An exception may not leave the threads it was thrown in (memory may run out anywhere): the first is kept for whoever
// started them.
class FirstException {
 public:
  template <class Function>
  void keep(const Function& function) noexcept {
    try {
      function();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!first_) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

// body(begin, end) over [0, count) in contiguous shares of at least `grain`. What body writes for an index must not
// depend on the share it falls in: that is what makes results the same for any thread count.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  const int64_t most = (count + grain - 1) / grain;
  const int64_t threads = most < max_threads() ? most : max_threads();
#ifdef _OPENMP
  if (threads > 1) {
    FirstException exception;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
      const int64_t team = omp_get_num_threads();
      const int64_t rank = omp_get_thread_num();
      const int64_t begin = count * rank / team;
      const int64_t end = count * (rank + 1) / team;
      if (begin < end) exception.keep([&] { body(begin, end); });
    }
    return exception.rethrow();
  }
#endif
  body(0, count);
}

// body(index, thread) for each index of [0, count), handed out one by one as threads come free: for tasks of unequal
// size, largest first. 0 <= thread < max_threads(), for a workspace each.
template <class Body>
void parallel_for_dynamic(int64_t count, const Body& body) {
#ifdef _OPENMP
  const int64_t threads = count < max_threads() ? count : max_threads();
  if (threads > 1) {
    FirstException exception;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads))
    for (int64_t i = 0; i < count; ++i) exception.keep([&] { body(i, omp_get_thread_num()); });
    return exception.rethrow();
  }
#endif
  for (int64_t i = 0; i < count; ++i) body(i, 0);
}

// Rows [begin, end) of chunk `c` out of `chunks`, the same for any thread count; each begins at a multiple of `whole`.
struct Range {
  int64_t begin, end;
};
inline Range chunk_range(int64_t count, int64_t chunks, int64_t c, int64_t whole = 1) {
  const auto begin_of = [&](int64_t chunk) {
    const int64_t begin = (count + whole - 1) / whole * chunk / chunks * whole;
    return begin < count ? begin : count;
  };
  return {begin_of(c), begin_of(c + 1)};
}

// Work of fewer elements than this is not worth waking a thread.
constexpr int64_t kGrainElements = 16 * 1024;
inline int64_t grain_rows(int64_t width) { return width > 0 ? (kGrainElements + width - 1) / width : kGrainElements; }

}  // namespace m3ae
