// sample_mask on a GPU: one block a sample, one launch. Words that fit are drawn once into shared memory.
#include "cuda/bind.h"
#include "cuda/reduce.cuh"
#include "ops/sample_mask/arguments.h"
#include "philox.h"

namespace m3ae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWords = 2048;  // that fit: positions of a sample; those of a longer one are drawn again when needed

// One of a sample's random words: see m3ae_fast/ops/sample_mask/reference.py.
struct Words {
  const uint32_t* drawn;  // null: too many
  uint32_t id, stream, step, key0, key1;

  __device__ Philox4 four(uint32_t counter) const {
    return philox4x32({counter, id, stream, step}, key0, key1);
  }
  __device__ uint32_t operator[](int position) const {
    if (drawn) return drawn[position];
    const Philox4 words = four(static_cast<uint32_t>(position) / 4);
    const int which = position % 4;
    return which == 0 ? words.x : which == 1 ? words.y : which == 2 ? words.z : words.w;
  }
};

__device__ int count_below(const Words& words, int length, uint32_t limit) {
  int count = 0;
  for (int start = 0; start < length; start += kThreads) {
    const int position = start + static_cast<int>(threadIdx.x);
    count += __syncthreads_count(position < length && words[position] < limit);
  }
  return count;
}

__global__ void __launch_bounds__(kThreads) sample_mask_kernel(SampleMask args) {
  __shared__ uint32_t drawn[kWords];
  __shared__ int before[kThreads / kWarp];
  const int sample = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int first = args.cu[sample], first_keep = args.cu_keep[sample];
  const int length = args.cu[sample + 1] - first, keep = args.cu_keep[sample + 1] - first_keep;
  const int64_t id = args.sample_ids[sample];
  Words words{nullptr, static_cast<uint32_t>(id), args.stream | static_cast<uint32_t>(id >> 32) << 8, args.step,
              static_cast<uint32_t>(args.seed), static_cast<uint32_t>(args.seed >> 32)};
  if (length <= kWords) {
    for (int counter = thread; 4 * counter < length; counter += kThreads) {
      const Philox4 four = words.four(static_cast<uint32_t>(counter));
      drawn[4 * counter] = four.x;
      drawn[4 * counter + 1] = four.y;
      drawn[4 * counter + 2] = four.z;
      drawn[4 * counter + 3] = four.w;
    }
    words.drawn = drawn;
    __syncthreads();
  }
  // The largest limit with no more than `keep` words below it, bit by bit; the first few equal to it fill up.
  uint32_t limit = 0;
  int below = 0;
  for (uint32_t bit = 1u << 31; bit != 0 && below < keep; bit >>= 1) {
    const int count = count_below(words, length, limit | bit);
    if (count <= keep) {
      limit |= bit;
      below = count;
    }
  }
  // Positions in order, a block of them at a time: kept ones and ties are counted by warp, then over the warps.
  const int ties = keep - below;
  int kept_before = 0, ties_before = 0;
  const auto scan = [&](int value, int& total) {
    const int inside = warp_scan(value);
    __syncthreads();
    if (thread % kWarp == kWarp - 1) before[thread / kWarp] = inside;
    __syncthreads();
    int sum = inside;
    total = 0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
      if (warp < thread / kWarp) sum += before[warp];
      total += before[warp];
    }
    return sum;
  };
  for (int start = 0; start < length; start += kThreads) {
    const int position = start + thread;
    const bool inside = position < length;
    const uint32_t word = inside ? words[position] : 0;
    const bool equal = inside && ties > 0 && word == limit;
    int ties_here = 0, kept_here = 0;
    const int tie = ties_before + (ties > 0 ? scan(equal, ties_here) : 0);
    const bool kept = inside && (word < limit || (equal && tie <= ties));
    const int rank = kept_before + scan(kept, kept_here) - kept;  // kept positions before this one
    if (kept) args.ids_keep[first_keep + rank] = position;
    if (inside && !kept) args.ids_mask[first - first_keep + position - rank] = position;
    ties_before += ties_here;
    kept_before += kept_here;
  }
}

void forward(const Tensor& cu, const Tensor& cu_keep, const Tensor& sample_ids, uint64_t seed, uint32_t step,
             uint32_t stream, const Tensor& ids_keep, const Tensor& ids_mask) {
  const SampleMask args = sample_mask_arguments(cu, cu_keep, sample_ids, seed, step, stream, ids_keep, ids_mask);
  M3AE_LAUNCH(sample_mask_kernel, grid(sample_ids.size(0)), kThreads, 0, stream_of(cu), args);
}

}  // namespace

void bind_sample_mask(pybind11::module_& module) {
  bind(module, "sample_mask", forward, {"cu", "cu_keep", "sample_ids", "seed", "step", "stream", "ids_keep",
       "ids_mask"});
}

}  // namespace m3ae::cuda
