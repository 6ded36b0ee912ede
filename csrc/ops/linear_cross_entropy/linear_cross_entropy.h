#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

// A row that counts.
struct CrossEntropyRow {
  int32_t row;                               // of x
  int32_t target;                            // in [0, vocab)
  double weight;                             // of the target's class
  double share = 1, loss_share = 1;          // what its hit and lse^2, and its loss, weigh in the reduced ones
  double dloss = 0, dlse = 0, dsquares = 0;  // gradients of its loss (as accumulators hold it), its lse and its lse^2
  double loss = 0, lse = 0;                  // cross entropy, as accumulators hold it (fp32; fp64 for Dtype::f64)
  bool hit = false;                          // the target's is the first of the largest logits
};

// Linear and cross entropy over a block of rows whose logits stay in a workspace. Each stage is a kernel over tasks that
// depend on nothing of their own stage, and no sum depends on how they are shared out:
//   pack       rows of x                    x in the two layouts that products read (csrc/cpu/gemm.h)
//   logits     panels of classes            x W^T + bias
//   softmax    rows                         loss, lse and hit; the logits become their gradients
//   dx         bands of rows x of columns   dlogits W
//   dweight    panels of classes            (+)= dlogits^T x, and the same for dbias
struct CrossEntropyBlock {
  const void* x;          // [T, width]
  const void* weight;     // [vocab, width]
  const void* bias;       // [vocab]; null: none
  void* dx;               // [T, width]; null: not wanted
  void* dweight;          // [vocab, width]; null: not wanted
  void* dbias;            // accumulators [vocab]; null: not wanted
  int64_t width, vocab;
  double label_smoothing;
  const void* class_weight;  // accumulators [vocab]; null: ones, or no smoothing, where the weights in `rows` will do
  double mean_weight;        // of class_weight; 1 for null
  Dtype dtype;            // of x and dx
  Dtype parameter_dtype;  // of weight, bias and dweight: dtype, or fp32 where that is bf16
  int parts;              // how many bf16 numbers stand for an fp32 one in a product: csrc/cpu/isa.h

  CrossEntropyRow* rows;            // of this block
  int64_t count;                    // how many
  bool first;                       // dweight and dbias hold nothing yet
  char *logits, *x_rows, *x_steps;  // workspaces, see CrossEntropySizes
};

// Bytes of the workspaces, which depend on what the instruction set multiplies.
struct CrossEntropySizes {
  int64_t logits_row, x_rows_row, x_steps_row;  // for each row of a block
  int64_t scratch;                              // for a thread, with blocks of `rows` rows
};

// A panel of classes and the whole width of it (128 KiB at 512) stay in L2; so do a band's sums and its part of weight.
constexpr int64_t kClassPanel = 64, kDxRows = 192, kDxColumns = 64;

}  // namespace m3ae

M3AE_PRODUCT_KERNEL(CrossEntropySizes cross_entropy_sizes(const CrossEntropyBlock& args, int64_t rows))
M3AE_PRODUCT_KERNEL(void cross_entropy_pack(const CrossEntropyBlock& args, int64_t begin, int64_t end))
M3AE_PRODUCT_KERNEL(void cross_entropy_logits(const CrossEntropyBlock& args, char* scratch, int64_t begin, int64_t end))
M3AE_PRODUCT_KERNEL(void cross_entropy_softmax(const CrossEntropyBlock& args, int64_t begin, int64_t end))
M3AE_PRODUCT_KERNEL(void cross_entropy_dx(const CrossEntropyBlock& args, char* scratch, int64_t begin, int64_t end))
M3AE_PRODUCT_KERNEL(void cross_entropy_dweight(const CrossEntropyBlock& args, char* scratch, int64_t begin, int64_t end))
