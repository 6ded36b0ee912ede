// layer_norm: rows [begin, end). Pure: no threads, no allocation. A row comes from memory once; the later passes find it
// in the first cache.
#include "ops/layer_norm/layer_norm.h"

#include "cpu/sum_lanes.h"

namespace m3ae::M3AE_ISA {
namespace {

M3AE_INLINE float root(float x) { return __builtin_sqrtf(x); }
M3AE_INLINE double root(double x) { return __builtin_sqrt(x); }

template <class X, class R, class S, class Y>
void forward(const LayerNorm& a, int64_t begin, int64_t end) {
  using V = Vec<S>;
  using Float = typename V::scalar;
  const int64_t width = a.width;
  const Float* weight = as<Float>(a.weight);
  const Float* bias = as<Float>(a.bias);
  Float* stats = as<Float>(a.stats);
  for (int64_t t = begin; t < end; ++t) {
    const X* x = as<X>(a.x) + t * width;
    const S* row = as<S>(a.x) + t * width;  // without residual X is S
    Float sum[1], squares[1];
    if (a.residual) {
      const R* residual = as<R>(a.residual) + t * width;
      S* s = as<S>(a.s) + t * width;
      row = s;
      sum_lanes<V>(width, sum, [&](int64_t d, int n, V* sum) {
        const V value = load_lanes<V>(x + d, n) + load_lanes<V>(residual + d, n);
        store_lanes(value, s + d, n);
        sum[0] = sum[0] + load_lanes<V>(s + d, n);  // of what was rounded and stored
      });
    } else {
      sum_lanes<V>(width, sum, [&](int64_t d, int n, V* sum) { sum[0] = sum[0] + load_lanes<V>(row + d, n); });
    }
    Float mean = sum[0] / static_cast<Float>(width);
    if (overflows(sum[0]))
      mean = static_cast<Float>(far_mean<V>(width, [row](int64_t d, int n) { return load_lanes<V>(row + d, n); }));
    const V center = V::set(mean);
    const auto off_center = [row, center](int64_t d, int n) { return only_first(load_lanes<V>(row + d, n) - center, n); };
    sum_lanes<V>(width, squares, [&](int64_t d, int n, V* sum) {
      const V off = off_center(d, n);
      sum[0] = V::fma(off, off, sum[0]);
    });
    Float rstd = Float(1) / root(squares[0] / static_cast<Float>(width) + static_cast<Float>(a.eps));
    if (overflows(squares[0])) rstd = static_cast<Float>(far_scale<V>(width, width, a.eps, off_center));
    stats[t] = mean;
    stats[a.count + t] = rstd;
    const V scale = V::set(rstd);
    Y* y = as<Y>(a.y) + t * width;
    for_lanes<V>(width, [&](int64_t d, int n) {
      const V normal = (load_lanes<V>(row + d, n) - center) * scale;
      const V by = weight ? load_lanes<V>(weight + d, n) : V::set(Float(1));
      store_lanes(V::fma(normal, by, bias ? load_lanes<V>(bias + d, n) : V::zero()), y + d, n);
    });
  }
}

// With h = (s - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - h * mean(g * h)) + ds.
template <class S, class Y>
void backward(const LayerNormBackward& a, int64_t begin, int64_t end, void* partial) {
  using V = Vec<S>;
  using Float = typename V::scalar;
  const int64_t width = a.width;
  const Float* weight = as<Float>(a.weight);
  const Float* stats = as<Float>(a.stats);
  Float* dweight = as<Float>(partial);
  Float* dbias = dweight + (partial ? width : 0);
  for (int64_t t = begin; t < end; ++t) {
    const Y* dy = as<Y>(a.dy) + t * width;
    const S* s = as<S>(a.s) + t * width;
    const V center = V::set(stats[t]), scale = V::set(stats[a.count + t]);
    Float sums[2];  // of g and of g * h
    sum_lanes<V>(width, sums, [&](int64_t d, int n, V* sum) {
      const V h = (load_lanes<V>(s + d, n) - center) * scale;
      V g = load_lanes<V>(dy + d, n);  // lanes from n on are zero
      if (partial) {
        store_lanes(V::fma(g, h, load_lanes<V>(dweight + d, n)), dweight + d, n);
        store_lanes(load_lanes<V>(dbias + d, n) + g, dbias + d, n);
      }
      if (weight) g = g * load_lanes<V>(weight + d, n);
      sum[0] = sum[0] + g;
      sum[1] = V::fma(g, h, sum[1]);
    });
    if (!a.dx) continue;
    const V mean_g = V::set(sums[0] / static_cast<Float>(width));
    const V mean_gh = V::set(sums[1] / static_cast<Float>(width));
    const S* ds = a.ds ? as<S>(a.ds) + t * width : nullptr;
    S* dx = as<S>(a.dx) + t * width;
    for_lanes<V>(width, [&](int64_t d, int n) {
      const V h = (load_lanes<V>(s + d, n) - center) * scale;
      V g = load_lanes<V>(dy + d, n);
      if (weight) g = g * load_lanes<V>(weight + d, n);
      const V value = (g - V::fma(h, mean_gh, mean_g)) * scale;
      store_lanes(ds ? value + load_lanes<V>(ds + d, n) : value, dx + d, n);
    });
  }
}

template <class X, class R, class S>
void forward_to(const LayerNorm& a, int64_t begin, int64_t end) {
  if (a.y_dtype == Dtype::bf16) return forward<X, R, S, bfloat16>(a, begin, end);
  forward<X, R, S, float>(a, begin, end);
}

}  // namespace

void layer_norm(const LayerNorm& a, int64_t begin, int64_t end) {
  const bool x_bf16 = a.x_dtype == Dtype::bf16, residual_bf16 = a.residual_dtype == Dtype::bf16;
  if (a.x_dtype == Dtype::f64) return forward<double, double, double, double>(a, begin, end);
  if (x_bf16 && residual_bf16) return forward_to<bfloat16, bfloat16, bfloat16>(a, begin, end);
  if (x_bf16) return forward_to<bfloat16, float, float>(a, begin, end);
  if (residual_bf16) return forward_to<float, bfloat16, float>(a, begin, end);
  forward_to<float, float, float>(a, begin, end);
}

void layer_norm_backward(const LayerNormBackward& a, int64_t begin, int64_t end, void* partial) {
  const bool s_bf16 = a.s_dtype == Dtype::bf16, y_bf16 = a.y_dtype == Dtype::bf16;
  if (a.s_dtype == Dtype::f64) return backward<double, double>(a, begin, end, partial);
  if (s_bf16 && y_bf16) return backward<bfloat16, bfloat16>(a, begin, end, partial);
  if (s_bf16) return backward<bfloat16, float>(a, begin, end, partial);
  if (y_bf16) return backward<float, bfloat16>(a, begin, end, partial);
  backward<float, float>(a, begin, end, partial);
}

}  // namespace m3ae::M3AE_ISA
