#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

// out[t] = source(t) + (position[slot[t]] + type(t)), see m3ae_fast/ops/restore_tokens/reference.py.
// A slot below `patches` is an image's, one from there on a text's, -1 neither (no position, no type).
struct RestoreTokens {
  const void* kept;              // [K, width]
  const int32_t* rows;           // [T], -1: the modality's mask token
  const int32_t* slots;          // [T], -1 .. patches + words - 1
  const void* image_mask_token;  // [width] each, in out's dtype; null: absent, counts as zero
  const void* text_mask_token;
  const void* image_position;    // [patches, width]
  const void* text_position;     // [words, width]
  const void* image_type;
  const void* text_type;
  void* out;                     // [T, width]
  int64_t width;
  int32_t patches;
  Dtype kept_dtype, out_dtype;
};

struct RestoreTokensBackward {
  const void* dout;        // [T, width]
  const int32_t* rows;     // [T]
  const int32_t* slots;    // [T]
  void* dkept;             // [K, width], every row named in rows is written here; null: not wanted
  int64_t width;
  int32_t patches;
  Dtype kept_dtype, out_dtype;
};

}  // namespace m3ae

M3AE_KERNEL(void restore_tokens(const RestoreTokens& args, int64_t begin, int64_t end))
// partial: accumulators [2][2][width] that rows of dout are added to, by modality (image, text), then by masked or
// kept; null: not wanted.
M3AE_KERNEL(void restore_tokens_backward(const RestoreTokensBackward& args, int64_t begin, int64_t end, void* partial))
