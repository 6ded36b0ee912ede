#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

// [rows][heads][width] of any row and head stride (in elements); width is dense.
struct HeadRows {
  void* data;
  int64_t row, head;
};

// Tuning numbers. What a task holds at once: keys and values of a block in L2, scores of a row block in L1.
constexpr int64_t kKeyBlock = 512;       // forward: keys packed together; beyond them the softmax is rescaled
constexpr int64_t kQueryBlock = 384;     // forward: queries of one task, which packs the keys anew
// A row block is a whole number of the rows that a product computes together (kWholeRows, csrc/cpu/units.h).
constexpr int64_t kScores = 4096;        // forward: scores at a time: as many queries as that makes, in whole tiles
constexpr int64_t kRowBlock = 48;        // forward: but no more than these
constexpr int64_t kGradQueryBlock = 512; // backward: queries packed together
constexpr int64_t kGradKeyBlock = 96;    // backward: keys between two additions to dq
constexpr int64_t kGradRowBlock = 12;    // backward: keys scored at a time; even, so that bf16 pairs never straddle

struct VarlenAttention {
  HeadRows q, k, v;
  void* out;           // [query rows][heads][width], dense
  void* stats;         // [2][heads][query rows], fp32 (fp64 for fp64): the score that weighs most, without the scale, and
                       // log2 of the sum of 2^((score - that) * scale * log2 e); 0 and -inf without keys
  int64_t query_rows, heads, groups, width;  // groups: query heads of a key head
  double scale;
  Dtype dtype;
};

struct VarlenAttentionBackward {
  HeadRows dout, q, k, v;
  const void* out;     // dense, as stats
  const void* stats;
  const void* dlse;    // [heads][query rows]; null: none
  HeadRows dq, dk, dv;
  int64_t query_rows, heads, groups, width;
  double scale;
  Dtype dtype;
};

// One sequence and some of its heads: forward for query heads and a block of the queries, backward for key heads.
struct AttentionTask {
  int64_t query, queries;  // first row and count
  int64_t key, keys;
  int64_t head, heads;
};

// Bytes of workspace for one task at a time, 64-byte aligned.
int64_t workspace_bytes(int64_t width, Dtype dtype);
int64_t backward_workspace_bytes(int64_t width, int64_t longest_key, Dtype dtype);

}  // namespace m3ae

// next: what this thread is likely to be given afterwards, to fetch it early; null where there is no more.
M3AE_PRODUCT_KERNEL(void varlen_attention(const VarlenAttention& args, const AttentionTask& task, const AttentionTask* next,
                                  void* workspace))
M3AE_PRODUCT_KERNEL(void varlen_attention_backward(const VarlenAttentionBackward& args, const AttentionTask& task,
                                           void* workspace))
