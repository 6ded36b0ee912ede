#include "ops/linear/linear.h"

#include <pybind11/pybind11.h>

#include <algorithm>

#include "cpu/pages.h"
#include "cpu/reduce_rows.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

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
  const Scratch packed(sizes.panel * std::min(panels, most)), scratch(sizes.scratch * threads);
  args.packed = packed.get();
  const auto each = [&](int64_t tasks, const auto& body) {
    if (!serial) return parallel_for_dynamic(tasks, [&](int64_t i, int thread) { body(i, scratch.get() + thread * sizes.scratch); });
    for (int64_t i = 0; i < tasks; ++i) body(i, scratch.get());
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
    const int64_t bands = std::max(least, std::min((wanted + chunks - 1) / chunks, (args.m + kThinRows - 1) / kThinRows));
    each(bands * chunks, [&](int64_t i, char* mine) {
      const Range rows = chunk_range(args.m, bands, i / chunks), columns = chunk_range(args.panels, chunks, i % chunks);
      M3AE_DISPATCH_PRODUCT(linear_multiply)(args, mine, rows.begin, rows.end - rows.begin, args.first_panel + columns.begin,
                                     columns.end - columns.begin);
    });
  }
}

// out [m][n] of a contraction over k.
LinearProduct product(Address left, Address right, Address out, int64_t m, int64_t n, int64_t k, int dtype,
                      int parameter_dtype) {
  LinearProduct args;
  args.left = pointer(left), args.right = pointer(right), args.out = pointer(out);
  args.m = m, args.n = n, args.k = k;
  args.dtype = Dtype(dtype), args.parameter_dtype = Dtype(parameter_dtype);
  return args;
}

// y = act(f(x) W^T + b), and what act was applied to (before; 0: not wanted).
void forward(Address x, Address weight, Address bias, Address before, Address y, int64_t rows, int64_t inner,
             int64_t outer, int input_activation, int activation, int dtype, int parameter_dtype) {
  LinearProduct args = product(x, weight, y, rows, outer, inner, dtype, parameter_dtype);
  args.right_by_rows = true;
  args.bias = pointer(bias), args.before = pointer(before);
  args.left_activation = Activation(input_activation), args.activation = Activation(activation);
  multiply(args);
}

// dx = f'(x) (dz W)
void backward_x(Address dz, Address weight, Address x, Address dx, int64_t rows, int64_t inner, int64_t outer,
                int input_activation, int dtype, int parameter_dtype) {
  LinearProduct args = product(dz, weight, dx, rows, inner, outer, dtype, parameter_dtype);
  if (input_activation) args.slope_at = pointer(x), args.slope = Activation(input_activation);
  multiply(args);
}

// dW = dz^T f(x)
void backward_weight(Address dz, Address x, Address dweight, int64_t rows, int64_t inner, int64_t outer,
                     int input_activation, int dtype, int parameter_dtype) {
  LinearProduct args = product(dz, x, dweight, outer, inner, rows, dtype, parameter_dtype);
  args.left_by_columns = true;
  args.right_activation = Activation(input_activation);
  multiply(args);
}

// dz = act'(z) dy and its column sums. dbias: [width] accumulators (fp32; fp64 for Dtype::f64), 0: not wanted. dz: 0:
// not wanted.
void activation_backward(Address dy, Address z, Address dz, Address dbias, int64_t count, int64_t width, int activation,
                         int dtype) {
  const LinearActivationBackward args{pointer(dy), pointer(z),             pointer(dz),
                                      width,       Activation(activation), Dtype(dtype)};
  const auto kernel = M3AE_DISPATCH_PRODUCT(linear_activation_backward);
  if (dz) prefer_huge_pages(pointer(dz), count * width * size_of(args.dtype));
  reduce_rows(count, width, args.dtype, pointer(dbias),
              [&](int64_t begin, int64_t end, void* sum) { kernel(args, sum, begin, end); });
}

}  // namespace

void bind_linear(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("linear", &forward, no_gil);
  module.def("linear_backward_x", &backward_x, no_gil);
  module.def("linear_backward_weight", &backward_weight, no_gil);
  module.def("linear_activation_backward", &activation_backward, no_gil);
}

}  // namespace m3ae
