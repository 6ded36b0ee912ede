#include "cpu/pages.h"
#include "cpu/reduce_rows.h"
#include "cpu/threads.h"
#include "ops/layer_norm/arguments.h"

namespace py = pybind11;

namespace m3ae {
namespace {

void forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double eps,
             const Tensor& y, const Tensor& s, const Tensor& stats) {
  const LayerNorm args = layer_norm_arguments(x, residual, weight, bias, eps, y, s, stats);
  prefer_huge_pages(args.y, args.count * args.width * size_of(args.y_dtype));
  if (args.s) prefer_huge_pages(args.s, args.count * args.width * size_of(s.dtype()));
  const auto kernel = M3AE_DISPATCH(layer_norm);
  parallel_for(args.count, grain_rows(args.width), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// dparams: [2][width], dweight and dbias.
void backward(const Tensor& dy, const Tensor& ds, const Tensor& s, const Tensor& weight, const Tensor& stats,
              const Tensor& dx, const Tensor& dparams) {
  const LayerNormBackward args = layer_norm_arguments(dy, ds, s, weight, stats, dx);
  if (args.dx) prefer_huge_pages(args.dx, args.count * args.width * size_of(args.s_dtype));
  const auto kernel = M3AE_DISPATCH(layer_norm_backward);
  void* sums = dparams.optional("dparams", {2, args.width}, accumulator(args.s_dtype));
  reduce_rows(args.count, 2 * args.width, args.s_dtype, sums,
              [&](int64_t begin, int64_t end, void* partial) { kernel(args, begin, end, partial); });
}

}  // namespace

void bind_layer_norm(py::module_& module) {
  bind(module, "layer_norm", forward, {"x", "residual", "weight", "bias", "eps", "y", "s", "stats"});
  bind(module, "layer_norm_backward", backward, {"dy", "ds", "s", "weight", "stats", "dx", "dparams"});
}

}  // namespace m3ae
