// What the bindings of the CPU and of CUDA take: tensors become a kernel's arguments, and are checked on the way.
#pragma once

#include "ops/restore_tokens/restore_tokens.h"
#include "tensor.h"

namespace m3ae {

inline RestoreTokens restore_tokens_arguments(const Tensor& kept, const Tensor& rows, const Tensor& slots,
                                              const Tensor& image_mask_token, const Tensor& text_mask_token,
                                              const Tensor& image_position, const Tensor& text_position,
                                              const Tensor& image_type, const Tensor& text_type, const Tensor& out) {
  const int64_t count = out.size(0), width = out.size(1);
  const Dtype dtype = out.dtype();
  return {kept.dense("kept", {kAny, width}), rows.int32s("rows", {count}), slots.int32s("slots", {count}),
          image_mask_token.optional("image_mask_token", {width}, dtype),
          text_mask_token.optional("text_mask_token", {width}, dtype),
          image_position.optional("image_position", {kAny, width}, dtype),
          text_position.optional("text_position", {kAny, width}, dtype),
          image_type.optional("image_type", {width}, dtype), text_type.optional("text_type", {width}, dtype),
          out.dense("out", {count, width}), width, static_cast<int32_t>(image_position.size(0)), kept.dtype(), dtype};
}

}  // namespace m3ae
