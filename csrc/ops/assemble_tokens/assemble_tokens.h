#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

// What is written to one output row: source + (position + type), null parts count as zero.
struct AssembledRow {
  const void* source;    // in out's dtype, or bfloat16
  const void* position;  // in out's dtype
  const void* type;      // in out's dtype
  bool bf16;             // source is bfloat16
};

struct AssembleTokens {
  const AssembledRow* rows;  // [T]
  void* out;                 // [T, width]
  int64_t width;
  Dtype out_dtype;
};

// Where one row of the output's gradient goes.
struct DisassembledRow {
  void* target;  // the gradient of its source row, in dout's dtype or bfloat16; null: not wanted
  int32_t part;  // whose sum it joins: 0 class tokens, 1 image rows, 2 text rows, -1 none
  bool bf16;     // target is bfloat16
};

struct AssembleTokensBackward {
  const DisassembledRow* rows;  // [T]
  const void* dout;             // [T, width]
  int64_t width;
  Dtype out_dtype;
};

}  // namespace m3ae

M3AE_KERNEL(void assemble_tokens(const AssembleTokens& args, int64_t begin, int64_t end))
// partial: accumulators [3][width] that the rows' sums are added to, one a part; null: not wanted
M3AE_KERNEL(void assemble_tokens_backward(const AssembleTokensBackward& args, int64_t begin, int64_t end, void* partial))
