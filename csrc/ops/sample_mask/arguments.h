// What the bindings of the CPU and of CUDA take: tensors become a kernel's arguments, and are checked on the way.
#pragma once

#include "ops/sample_mask/sample_mask.h"
#include "tensor.h"

namespace m3ae {

inline SampleMask sample_mask_arguments(const Tensor& cu, const Tensor& cu_keep, const Tensor& sample_ids,
                                        uint64_t seed, uint32_t step, uint32_t stream, const Tensor& ids_keep,
                                        const Tensor& ids_mask) {
  const int64_t samples = sample_ids.size(0);
  return {cu.int32s("cu", {samples + 1}), cu_keep.int32s("cu_keep", {samples + 1}),
          sample_ids.integers<int64_t>("sample_ids", {samples}), ids_keep.int32s("ids_keep", {kAny}),
          ids_mask.int32s("ids_mask", {kAny}), seed, step, stream};
}

}  // namespace m3ae
