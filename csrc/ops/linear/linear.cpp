#include "ops/linear/linear.h"

#include <algorithm>
#include <string>

#include "cpu/pages.h"
#include "cpu/reduce_rows.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "tensor.h"

namespace py = pybind11;

namespace m3ae {
namespace {

constexpr int64_t kSerialProducts = int64_t{1} << 18;  // multiplications: fewer are not worth waking a thread
constexpr int64_t kPackedBytes = int64_t{16} << 20, kLeastPanels = 4;
constexpr int64_t kThinRows = 24;                      // a band of fewer would read more of the right operand than it uses

void multiply(LinearProduct& args) {
  const LinearSizes sizes = M3AE_DISPATCH_PRODUCT(linear_sizes)(args);
  const int64_t panels = (args.n + kPanel - 1) / kPanel;
  if (args.m == 0 || panels == 0) return;
  // A long contraction (dW of a large batch) packs fewer columns at a time.
  const int64_t most = std::clamp<int64_t>(kPackedBytes / std::max<int64_t>(sizes.panel, 1), kLeastPanels, kGroupPanels);
  const int64_t groups = (panels + most - 1) / most;
  const bool serial = args.m * args.n * (args.k + 1) <= kSerialProducts;
  const int64_t threads = serial ? 1 : max_threads();
  const int64_t packed_bytes = sizes.panel * std::min(panels, most);
  const Scratch scratch(packed_bytes + sizes.scratch * threads);
  args.packed = scratch.get();
  char* const of_threads = scratch.get() + packed_bytes;
  const auto each = [&](int64_t tasks, const auto& body) {
    if (!serial)
      return parallel_for_dynamic(tasks, [&](int64_t i, int thread) { body(i, of_threads + thread * sizes.scratch); });
    for (int64_t i = 0; i < tasks; ++i) body(i, of_threads);
  };
  for (int64_t group = 0; group < groups; ++group) {
    const Range range = chunk_range(panels, groups, group);
    args.first_panel = range.begin;
    args.panels = range.end - range.begin;
    each(args.panels * sizes.blocks, [&](int64_t i, char* mine) {
      M3AE_DISPATCH_PRODUCT(linear_pack)(args, mine, args.first_panel + i / sizes.blocks, i % sizes.blocks);
    });
    // Bands of rows, and where they are too few to feed the threads evenly, shares of the columns and thinner bands. No
    // sum depends on it.
    const int64_t wanted = 4 * threads, least = (args.m + kBlockRows - 1) / kBlockRows;
    const int64_t chunks = std::clamp<int64_t>((wanted + least - 1) / least, 1, (args.panels + 1) / 2);
    const int64_t thin = std::max(kThinRows, sizes.rows);
    const int64_t bands = std::max(least, std::min((wanted + chunks - 1) / chunks, (args.m + thin - 1) / thin));
    each(bands * chunks, [&](int64_t i, char* mine) {
      const Range rows = chunk_range(args.m, bands, i / chunks, sizes.rows);
      const Range columns = chunk_range(args.panels, chunks, i % chunks);
      M3AE_DISPATCH_PRODUCT(linear_multiply)(args, mine, rows.begin, rows.end - rows.begin,
                                             args.first_panel + columns.begin, columns.end - columns.begin);
    });
  }
}

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  M3AE_CHECK(name.empty(), "activation must be empty, gelu or gelu_tanh, got ", name);
  return Activation::none;
}

// out [m][n] of a contraction over k.
LinearProduct product(const void* left, const void* right, void* out, int64_t m, int64_t n, int64_t k, Dtype dtype,
                      Dtype parameter_dtype, int products) {
  LinearProduct args;
  args.left = left, args.right = right, args.out = out;
  args.m = m, args.n = n, args.k = k;
  args.dtype = dtype, args.parameter_dtype = parameter_dtype;
  args.parts = bf16_parts(static_cast<Products>(products));
  return args;
}

// y = act(f(x) W^T + b), and z, what act was applied to.
void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::string& activation,
             const std::string& input_activation, int products, const Tensor& y, const Tensor& z) {
  const int64_t rows = x.size(0), inner = x.size(1), outer = weight.size(0);
  LinearProduct args = product(x.dense("x", {rows, inner}), weight.dense("weight", {outer, inner}),
                               y.dense("y", {rows, outer}, x.dtype()), rows, outer, inner, x.dtype(), weight.dtype(),
                               products);
  args.right_by_rows = true;
  args.bias = bias.optional("bias", {outer}, weight.dtype());
  args.before = z.optional("z", {rows, outer}, x.dtype());
  args.left_activation = activation_of(input_activation), args.activation = activation_of(activation);
  multiply(args);
}

// dz = act'(z) dy, its column sums, dx = f'(x) (dz W) and dW = dz^T f(x), as far as they are wanted. dz: without an
// activation dy itself.
void backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& z, const std::string& activation,
              const std::string& input_activation, int products, const Tensor& dz, const Tensor& dx,
              const Tensor& dweight, const Tensor& dbias) {
  const int64_t rows = x.size(0), inner = x.size(1), outer = weight.size(0);
  const Dtype dtype = dy.dtype(), parameter_dtype = weight.dtype();
  const Activation act = activation_of(activation), input = activation_of(input_activation);
  void* gradient = dz.dense("dz", {rows, outer}, dtype);
  const void* in = x.dense("x", {rows, inner}, dtype);
  if (act != Activation::none || dbias) {
    const bool through = act != Activation::none;
    const LinearActivationBackward args{dy.dense("dy", {rows, outer}),
                                        through ? z.dense("z", {rows, outer}, dtype) : nullptr,
                                        through ? gradient : nullptr, outer, act, dtype};
    const auto kernel = M3AE_DISPATCH_PRODUCT(linear_activation_backward);
    if (through) prefer_huge_pages(gradient, rows * outer * size_of(dtype));
    reduce_rows(rows, outer, dtype, dbias.optional("dbias", {outer}, accumulator(dtype)),
                [&](int64_t begin, int64_t end, void* sum) { kernel(args, sum, begin, end); });
  }
  if (dx) {
    LinearProduct args = product(gradient, weight.dense("weight", {outer, inner}), dx.dense("dx", {rows, inner}, dtype),
                                 rows, inner, outer, dtype, parameter_dtype, products);
    if (input != Activation::none) args.slope_at = in, args.slope = input;
    multiply(args);
  }
  if (dweight) {
    LinearProduct args = product(gradient, in, dweight.dense("dweight", {outer, inner}, parameter_dtype), outer, inner,
                                 rows, dtype, parameter_dtype, products);
    args.left_by_columns = true;
    args.right_activation = input;
    multiply(args);
  }
}

}  // namespace

void bind_linear(py::module_& module) {
  bind(module, "linear", forward, {"x", "weight", "bias", "activation", "input_activation", "products", "y", "z"});
  bind(module, "linear_backward", backward, {"dy", "x", "weight", "z", "activation", "input_activation", "products",
       "dz", "dx", "dweight", "dbias"});
}

}  // namespace m3ae
