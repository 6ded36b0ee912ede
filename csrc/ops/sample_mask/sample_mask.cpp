#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "cpu/threads.h"
#include "ops/sample_mask/arguments.h"
#include "philox.h"

namespace py = pybind11;

namespace m3ae {
namespace {

// Everything the kernel takes for granted. Returns the longest length.
int64_t check(const int32_t* cu, const int32_t* cu_keep, const int64_t* sample_ids, int64_t samples, int64_t total,
              int64_t total_keep, bool shared) {
  int64_t longest = 0;
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t length = int64_t{cu[i + 1]} - cu[i], keep = int64_t{cu_keep[i + 1]} - cu_keep[i];
    M3AE_CHECK(keep >= 0 && keep <= length, "num_keep must be in [0, length] for every sample, got ", keep, " of ",
               length, " positions in sample ", i);
    M3AE_CHECK(sample_ids[i] >= 0 && sample_ids[i] < (int64_t{1} << 56), "sample_ids must be in [0, ",
               int64_t{1} << 56, "), got ", sample_ids[i]);
    M3AE_CHECK(!shared || (length == cu[1] && keep == cu_keep[1]),
               "lengths and num_keep must be the same for all samples with shared=True, got ", keep, " of ", length,
               " in sample ", i, " and ", cu_keep[1], " of ", cu[1], " in sample 0");
    if (length > longest) longest = length;
  }
  M3AE_CHECK(cu[0] == 0 && cu[samples] == total, "lengths must sum to ", total, ", got offsets ", cu[0], " to ",
             cu[samples]);
  M3AE_CHECK(cu_keep[0] == 0 && cu_keep[samples] == total_keep, "num_keep must sum to ", total_keep, ", got offsets ",
             cu_keep[0], " to ", cu_keep[samples]);
  return longest;
}

void forward(const Tensor& cu, const Tensor& cu_keep, const Tensor& sample_ids, uint64_t seed, uint32_t step,
             uint32_t stream, bool shared, const Tensor& ids_keep, const Tensor& ids_mask) {
  const SampleMask args = sample_mask_arguments(cu, cu_keep, sample_ids, seed, step, stream, ids_keep, ids_mask);
  const int64_t samples = sample_ids.size(0), total_keep = ids_keep.size(0), total = total_keep + ids_mask.size(0);
  const int64_t longest = check(args.cu, args.cu_keep, args.sample_ids, samples, total, total_keep, shared);
  const int64_t padded = (longest + kSampleMaskBlock - 1) / kSampleMaskBlock * kSampleMaskBlock;
  const auto kernel = M3AE_DISPATCH(sample_mask);
  parallel_for(samples, grain_rows(longest), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> words(static_cast<size_t>(padded));
    kernel(args, words.data(), begin, end);
  });
}

// For the known-answer tests.
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const Philox4 words = philox4x32({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
  return {words.x, words.y, words.z, words.w};
}

}  // namespace

void bind_sample_mask(py::module_& module) {
  bind(module, "sample_mask", forward, {"cu", "cu_keep", "sample_ids", "seed", "step", "stream", "shared", "ids_keep",
       "ids_mask"});
  module.def("philox4x32", &philox, "the four words of a counter and a key");
}

}  // namespace m3ae
