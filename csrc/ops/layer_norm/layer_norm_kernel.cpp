// layer_norm: rows [begin, end). Pure: no threads, no allocation. A row is read from memory once and then worked on in
// `row`, which stays in the first cache.
#include "ops/layer_norm/layer_norm.h"

#include "cpu/vec.h"

namespace m3ae::M3AE_ISA {
namespace {

M3AE_INLINE float root(float x) { return __builtin_sqrtf(x); }
M3AE_INLINE double root(double x) { return __builtin_sqrt(x); }

// The sum over d of term(d, n), in four independent chains: one would wait for the adder's latency at every step.
template <class V, class Term>
M3AE_INLINE typename V::scalar sum_lanes(int64_t width, Term&& term) {
  V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t d = 0;
  for (; d + 4 * V::width <= width; d += 4 * V::width)
    for (int j = 0; j < 4; ++j) sum[j] = sum[j] + term(d + j * V::width, V::width);
  for_lanes<V>(width - d, [&](int64_t e, int n) { sum[0] = sum[0] + term(d + e, n); });
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
}

// Lanes past n hold zero, so that they add nothing to a sum.
template <class V>
M3AE_INLINE V only_first(V x, int n) {
  if (n == V::width) return x;
  typename V::scalar lanes[V::width];
  x.store(lanes);
  return V::load_first(lanes, n);
}

// row = x + residual rounded to S, written to s where there is one; returns its sum.
template <class X, class R, class S>
M3AE_INLINE typename Vec<S>::scalar read_row(const X* x, const R* residual, S* s, typename Vec<S>::scalar* row,
                                             int64_t width) {
  using V = Vec<S>;
  return sum_lanes<V>(width, [&](int64_t d, int n) {
    V value = load_lanes<V>(x + d, n);
    if (residual) {
      store_lanes(value + load_lanes<V>(residual + d, n), s + d, n);
      value = load_lanes<V>(s + d, n);  // the statistics are those of what was rounded and stored
    }
    store_lanes(value, row + d, n);
    return value;
  });
}

template <class X, class R, class S, class Y>
void forward(const LayerNorm& a, int64_t begin, int64_t end, void* scratch) {
  using V = Vec<S>;
  using Float = typename V::scalar;
  const int64_t width = a.width;
  const Float* weight = as<Float>(a.weight);
  const Float* bias = as<Float>(a.bias);
  Float* stats = as<Float>(a.stats);
  Float* row = as<Float>(scratch);
  for (int64_t t = begin; t < end; ++t) {
    const R* residual = a.residual ? as<R>(a.residual) + t * width : nullptr;
    S* s = a.s ? as<S>(a.s) + t * width : nullptr;
    const Float mean = read_row<X, R, S>(as<X>(a.x) + t * width, residual, s, row, width) / static_cast<Float>(width);
    const V center = V::set(mean);
    const Float squares = sum_lanes<V>(width, [&](int64_t d, int n) {
      const V off = only_first(load_lanes<V>(row + d, n) - center, n);
      return off * off;
    });
    const Float rstd = Float(1) / root(squares / static_cast<Float>(width) + static_cast<Float>(a.eps));
    stats[t] = mean;
    stats[a.count + t] = rstd;
    const V scale = V::set(rstd);
    Y* y = as<Y>(a.y) + t * width;
    for_lanes<V>(width, [&](int64_t d, int n) {
      V value = (load_lanes<V>(row + d, n) - center) * scale;
      const V by = weight ? load_lanes<V>(weight + d, n) : V::set(Float(1));
      value = V::fma(value, by, bias ? load_lanes<V>(bias + d, n) : V::zero());
      store_lanes(value, y + d, n);
    });
  }
}

// With h = (s - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - h * mean(g * h)) + ds.
template <class S, class Y>
void backward(const LayerNormBackward& a, int64_t begin, int64_t end, void* scratch, void* partial) {
  using V = Vec<S>;
  using Float = typename V::scalar;
  const int64_t width = a.width;
  const Float* weight = as<Float>(a.weight);
  const Float* stats = as<Float>(a.stats);
  Float* dweight = as<Float>(partial);
  Float* dbias = dweight + (partial ? width : 0);
  Float* h = as<Float>(scratch);
  Float* g = h + width;
  for (int64_t t = begin; t < end; ++t) {
    const Y* dy = as<Y>(a.dy) + t * width;
    const S* s = as<S>(a.s) + t * width;
    const V center = V::set(stats[t]), scale = V::set(stats[a.count + t]);
    const Float sum = sum_lanes<V>(width, [&](int64_t d, int n) {
      const V normal = (load_lanes<V>(s + d, n) - center) * scale;
      V grad = load_lanes<V>(dy + d, n);
      if (partial) {
        store_lanes(V::fma(grad, normal, load_lanes<V>(dweight + d, n)), dweight + d, n);
        store_lanes(load_lanes<V>(dbias + d, n) + grad, dbias + d, n);
      }
      if (weight) grad = grad * load_lanes<V>(weight + d, n);
      store_lanes(normal, h + d, n);
      store_lanes(grad, g + d, n);
      return grad;
    });
    if (!a.dx) continue;
    const Float dot = sum_lanes<V>(width, [&](int64_t d, int n) { return load_lanes<V>(h + d, n) * load_lanes<V>(g + d, n); });
    const V mean_g = V::set(sum / static_cast<Float>(width)), mean_gh = V::set(dot / static_cast<Float>(width));
    const S* ds = a.ds ? as<S>(a.ds) + t * width : nullptr;
    S* dx = as<S>(a.dx) + t * width;
    for_lanes<V>(width, [&](int64_t d, int n) {
      V value = (load_lanes<V>(g + d, n) - V::fma(load_lanes<V>(h + d, n), mean_gh, mean_g)) * scale;
      if (ds) value = value + load_lanes<V>(ds + d, n);
      store_lanes(value, dx + d, n);
    });
  }
}

template <class X, class R, class S>
void forward_to(const LayerNorm& a, int64_t begin, int64_t end, void* row) {
  if (a.y_dtype == Dtype::bf16) return forward<X, R, S, bfloat16>(a, begin, end, row);
  forward<X, R, S, float>(a, begin, end, row);
}

}  // namespace

void layer_norm(const LayerNorm& a, int64_t begin, int64_t end, void* row) {
  const bool x_bf16 = a.x_dtype == Dtype::bf16, residual_bf16 = a.residual_dtype == Dtype::bf16;
  if (a.x_dtype == Dtype::f64) return forward<double, double, double, double>(a, begin, end, row);
  if (x_bf16 && residual_bf16) return forward_to<bfloat16, bfloat16, bfloat16>(a, begin, end, row);
  if (x_bf16) return forward_to<bfloat16, float, float>(a, begin, end, row);
  if (residual_bf16) return forward_to<float, bfloat16, float>(a, begin, end, row);
  forward_to<float, float, float>(a, begin, end, row);
}

void layer_norm_backward(const LayerNormBackward& a, int64_t begin, int64_t end, void* row, void* partial) {
  const bool s_bf16 = a.s_dtype == Dtype::bf16, y_bf16 = a.y_dtype == Dtype::bf16;
  if (a.s_dtype == Dtype::f64) return backward<double, double>(a, begin, end, row, partial);
  if (s_bf16 && y_bf16) return backward<bfloat16, bfloat16>(a, begin, end, row, partial);
  if (s_bf16) return backward<bfloat16, float>(a, begin, end, row, partial);
  if (y_bf16) return backward<float, bfloat16>(a, begin, end, row, partial);
  backward<float, float>(a, begin, end, row, partial);
}

}  // namespace m3ae::M3AE_ISA
