#pragma once

#include "cpu/dispatch.h"
#include "dtype.h"

namespace m3ae {

enum class Activation : int { none, gelu, gelu_tanh };

// out[m][n] = finish(sum_k left(m, k) right(k, n)): the three products of a linear layer y = act(f(x) W^T + b).
//   forward  left x, right W by rows, bias, activation          dx  left dz, right W, slope_at x
//   dweight  left dz by columns, right x, right_activation f
// An activation of an operand is applied while it is packed, one of the result while it is stored. Parameters (W, b, dW)
// may be fp32 where rows are bf16: they are rounded while they are packed, and their gradient is not rounded at all. So
// are all operands where fp32 is multiplied as bf16 (`parts`).
struct LinearProduct {
  const void* left = nullptr;      // [m][k]; by columns: [k][m]
  const void* right = nullptr;     // [k][n]; by rows: [n][k]
  const void* bias = nullptr;      // [n]; null: none
  const void* slope_at = nullptr;  // [m][n]: the sum is multiplied by slope's derivative there; null: it is not
  void* before = nullptr;          // [m][n]: what the activation was applied to; null: not wanted
  void* out = nullptr;             // [m][n]
  int64_t m = 0, n = 0, k = 0;
  bool left_by_columns = false, right_by_rows = false;
  Activation left_activation = Activation::none, right_activation = Activation::none;
  Activation activation = Activation::none, slope = Activation::none;
  Dtype dtype = Dtype::f32, parameter_dtype = Dtype::f32;
  int parts = 0;  // how many bf16 numbers stand for an fp32 one: csrc/cpu/isa.h

  int64_t first_panel = 0, panels = 0;  // the group of columns that is being computed
  char* packed = nullptr;               // right(:, group), packed: LinearSizes::panel bytes each
};

struct LinearSizes {
  int64_t panel;    // bytes of a packed panel, all parts
  int64_t scratch;  // bytes, for a thread
  int64_t blocks;   // of kProductSteps at most, along k
  int64_t rows;     // bands are whole numbers of so many, but for the last
};

constexpr int64_t kPanel = 64;         // columns of a tile on avx512
constexpr int64_t kGroupPanels = 16;   // at most, whose right operand is packed at a time
constexpr int64_t kBlockRows = 96;     // of the result, in one task: 16 tiles
constexpr int64_t kProductSteps = 256;  // units that a product adds up before the sum joins its total

// dz = act'(z) dy, and its sum over rows.
struct LinearActivationBackward {
  const void* dy;  // [M, width]
  const void* z;   // [M, width]; unused without an activation
  void* dz;        // [M, width]; null: not wanted
  int64_t width;
  Activation activation;
  Dtype dtype;
};

}  // namespace m3ae

M3AE_PRODUCT_KERNEL(LinearSizes linear_sizes(const LinearProduct& args))
M3AE_PRODUCT_KERNEL(void linear_pack(const LinearProduct& args, char* scratch, int64_t panel, int64_t block))
M3AE_PRODUCT_KERNEL(void linear_multiply(const LinearProduct& args, char* scratch, int64_t row, int64_t rows, int64_t panel,
                                 int64_t panels))
M3AE_PRODUCT_KERNEL(void linear_activation_backward(const LinearActivationBackward& args, void* sum, int64_t begin, int64_t end))
